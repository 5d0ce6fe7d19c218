"""The command line: verbs, exit codes, errors in one shape. Each command imports its stage when called, so --help loads no torch."""

from gemma_grpo.cli.app import main, run

__all__ = ["main", "run"]
