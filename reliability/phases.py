"""What another process is doing at this moment: a byte of shared memory that a thread of it writes every half millisecond.

The thread looks at which functions its main thread is in, so nothing that is watched has to know of it, and a kill leaves the last byte.
"""

from __future__ import annotations

import math
import mmap
import os
import signal
import sys
import threading
import time
from types import FrameType

PLACES: dict[str, set[tuple[str, str]]] = {
    "pruning": {("checkpoint", "_prune")},
    "saving": {("checkpoint", "save_checkpoint"), ("keeping", "save"), ("trainer", "save_model")},
    "evaluation": {("trainer", "evaluate")},
    "witness": {("lookout", "look")},
    "reward training": {("trainer", "_train_reward")},
    "logging": {("events", name) for name in ("append_metrics", "append_samples", "append_look", "event", "ended")},
    "update": {("update", "update")},
    "rollout": {("local", "sample")},
    "reward": {("base", "score")},
    "reference": {("step", "policy_batch")},
    "resuming": {("trainer", "_go_on_from"), ("resuming", "newest_checkpoint")},
    "loading": {("preparation", "_prepare"), ("preparation", "_open_run")},
}
"""Phase -> the files and functions that make it; the first that any of the main thread's functions is in, counts."""
NAMES = ("starting", *PLACES, "between")
_SECONDS = 0.0005


class PhaseByte:
    """Made before a fork, told by the child, read by the parent."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1)

    @property
    def phase(self) -> str:
        """What was told last."""
        return NAMES[self._memory[0]]

    def forget(self) -> None:
        """Before another child."""
        self._memory[0] = 0

    def tell(self, *, before: str | None = None, rollouts: float = math.inf) -> None:
        """Tell what this process's main thread is doing, from now until the process ends.

        It is killed, by itself, where phase `before` begins or one more rollout than so many: who watches from outside can be too late.
        """
        sys.setswitchinterval(_SECONDS)  # else the thread waits ten times longer for its turn
        options = (threading.main_thread().ident, before, rollouts)
        threading.Thread(target=self._watch, args=options, daemon=True).start()

    def _watch(self, thread: int, before: str | None, rollouts: float) -> None:
        begun, last = 0, ""
        while True:
            name = phase_of(sys._current_frames().get(thread))
            self._memory[0] = NAMES.index(name)
            begun, last = begun + (name == "rollout" != last), name
            if name == before or begun > rollouts:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(_SECONDS)


def phase_of(frame: FrameType | None) -> str:
    """The phase that a thread whose innermost frame this is, is in."""
    there: set[tuple[str, str]] = set()
    while frame is not None:
        code = frame.f_code
        there.add((code.co_filename.rpartition("/")[2].removesuffix(".py"), code.co_name))
        frame = frame.f_back
    return next((name for name, places in PLACES.items() if places & there), "between")
