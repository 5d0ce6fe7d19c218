"""The command line: verbs, exit codes, errors in one shape. Each command imports its stage when called, so --help loads no torch.

Here only what must come before the first import that takes time: what a signal does until a run listens for itself.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from gemma_grpo.launched import is_first
from gemma_grpo.stopping import EXIT_CODE, heard_signals

__all__ = ["main", "run", "say_stopped"]

_STOPPED = b"error: stopped.\n  What was written so far is in the run directory; `train ... --resume` goes on with it.\n"


def main() -> None:
    """The console script. Outside a run there is nothing to save, and a signal ends the process at once, with a code that tells."""
    for number in heard_signals():
        signal.signal(number, _end)
    from gemma_grpo.cli.app import main as main_of_verbs

    main_of_verbs()


def run(arguments: Sequence[str]) -> int:
    """One command line without the program's name; returns the exit code and never raises for what a user can cause."""
    from gemma_grpo.cli.app import run as run_verb

    return run_verb(arguments)


def say_stopped() -> None:
    """Past sys.stderr, which may be in the middle of a line, or gone with its terminal."""
    with suppress(OSError):
        if is_first():
            os.write(2, _STOPPED)


def _end(number: int, frame: FrameType | None) -> None:
    # not an exception: while modules are imported it can get lost, printed as "ignored", or end the process by another code
    say_stopped()
    os._exit(EXIT_CODE)
