"""Starts the ranks of a run on this machine, and waits for them: torchrun's own agent, within this process.

Several machines are started by torchrun itself (docs/many-gpus.md); what ranks do is distributed.py's.
"""

from __future__ import annotations

import logging
import math
import signal
import sys
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gemma_grpo.config.machine import RanksSettings
from gemma_grpo.stopping import EXIT_CODE


def number_of_cards() -> int:
    """GPUs of this machine."""
    return torch.cuda.device_count()


def check_cards(count: int) -> None:
    """Raise ValueError where this machine has GPUs, but not so many."""
    there = number_of_cards()
    if 0 < there < count:
        raise ValueError(f"gpus is {count}, and this machine has {there}. Give gpus={there}, or start several machines by torchrun.")


def launch(words: Sequence[str], count: int, settings: RanksSettings) -> int:
    """Run `gemma-grpo WORDS` as `count` ranks; the exit code of the first that failed, EXIT_CODE where they were asked to stop.

    All are started again, at most settings.max_restarts times, when one fails. Raises ValueError where there are too few GPUs.
    """
    check_cards(count)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what a rank says of its end is enough
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="gemma-grpo",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=settings.max_restarts,
        logs_specs=DefaultLogsSpecs(),
        shutdown_timeout=math.ceil(settings.grace_seconds),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "gemma_grpo.cli", *words)
    except ChildFailedError as failed:
        number, first = failed.get_first_failure()
        return first.exitcode if first.exitcode > 0 else _killed(number, -first.exitcode)
    except SignalException:
        return EXIT_CODE
    return 0


def _killed(number: int, by: int) -> int:
    print(f"error: rank {number} was killed by {signal.Signals(by).name}.", file=sys.stderr)
    return 1
