"""`python -m gemma_grpo` is `gemma-grpo`: what torchrun starts."""

from gemma_grpo.cli import main

main()
