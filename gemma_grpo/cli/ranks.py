"""`gpus=8` on a command line: the same line again, in a process for each GPU."""

from __future__ import annotations

import sys

from gemma_grpo.config import GRPOConfig


def start_ranks(config: GRPOConfig) -> int:
    """This command line again in config.gpus processes; the exit code. Where they write is settled before: they may be started again."""
    from gemma_grpo.grpo.preflight import run_path
    from gemma_grpo.launcher import launch

    words = sys.argv[1:]
    if config.output_dir is None:
        words += [f"output_dir={run_path(config)}"]
    return launch(words, config.gpus, config.ranks)
