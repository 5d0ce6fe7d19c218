"""`python -m gemma_grpo.cli` is `gemma-grpo`."""

from gemma_grpo.cli import main

main()
