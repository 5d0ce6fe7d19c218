"""Says what a run is waiting for when a phase takes far longer than it used to. It ends nothing: who waits may know why.

Owns what the process is doing now (`current`), how long each phase has taken so far, and the thread that looks. One run per process.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

UNKNOWN_FACTOR = 10.0
"""Times the floor that a phase may take whose usual length is not known yet."""
_REMEMBERED = 50
_KNOWN_AFTER = 3
"""Times a phase must have ended before its median says something."""
_PACKAGE = str(Path(__file__).resolve().parent)

Say = Callable[[str, list[str]], None]
"""A sentence, and the waiting thread's stack, innermost frame last: `name (file:line)`."""


@dataclass
class _Phase:
    name: str
    detail: str
    started: float
    tell_after: float
    """Seconds; doubled each time it was told."""


@dataclass
class _State:
    phases: list[_Phase] = field(default_factory=list)
    """From the outermost to the innermost."""
    seconds: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=_REMEMBERED)))
    factor: float | None = None
    floor: float = 0.0
    thread: int = 0
    """Whose stack is shown."""


_state = _State()


def current() -> str:
    """The innermost phase that is under way; empty between phases."""
    phases = _state.phases
    return phases[-1].name if phases else ""


def detail() -> str:
    """What the innermost phase works with; empty between phases."""
    phases = _state.phases
    return phases[-1].detail if phases else ""


@contextmanager
def phase(name: str, detail: str = "") -> Iterator[None]:
    """What is done inside is one phase; `detail` says what with, such as the prompts' ids."""
    now = _Phase(name, detail, time.monotonic(), _allowed(name))
    _state.phases.append(now)
    try:
        yield
    finally:
        _state.phases.pop()
    _state.seconds[name].append(time.monotonic() - now.started)


@contextmanager
def watching(say: Say, *, factor: float | None, floor_seconds: float) -> Iterator[None]:
    """Watch the calling thread's phases; None watches nothing. `say` is called from another thread."""
    global _state
    outer, _state = _state, _State(factor=factor, floor=floor_seconds, thread=threading.get_ident())
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(_state, say, over), daemon=True, name="watchdog")
    if factor is not None:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if factor is not None:
            thread.join()
        _state = outer


def _watch(state: _State, say: Say, over: threading.Event) -> None:
    while not over.wait(min(1.0, state.floor / 4)):
        waiting = next(reversed(state.phases[:]), None)
        if waiting is None or time.monotonic() - waiting.started < waiting.tell_after:
            continue
        stack = _stack(state.thread)
        with suppress(Exception):  # a full disk must not end the watching
            say(_told(state, waiting, stack), stack)
        waiting.tell_after *= 2


def _allowed(name: str) -> float:
    """Seconds a phase may take before it is told."""
    if _state.factor is None:
        return float("inf")
    seconds = _state.seconds[name]
    if len(seconds) < _KNOWN_AFTER:
        return UNKNOWN_FACTOR * _state.floor
    return max(_state.floor, _state.factor * statistics.median(seconds))


def _told(state: _State, waiting: _Phase, stack: list[str]) -> str:
    seconds, past = time.monotonic() - waiting.started, state.seconds[waiting.name]
    usual = f", {seconds / statistics.median(past):.0f} times its median of {_shown(statistics.median(past))} s" if past else ""
    detail = f" ({waiting.detail})" if waiting.detail else ""
    return f"{waiting.name} has taken {_shown(seconds)} s{usual}{detail}: waiting in {_where(stack)}."


def _shown(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


def _where(stack: list[str]) -> str:
    """The innermost frame, and the innermost of ours when that is somebody else's."""
    if not stack:
        return "an unknown place"
    ours = [frame for frame in stack if "(gemma_grpo/" in frame]
    return stack[-1] if not ours or ours[-1] == stack[-1] else f"{stack[-1]}, called by {ours[-1]}"


def _stack(thread: int) -> list[str]:
    frame: FrameType | None = sys._current_frames().get(thread)
    frames = traceback.extract_stack(frame) if frame is not None else []
    return [f"{one.name} ({_short(one.filename)}:{one.lineno})" for one in frames]


def _short(filename: str) -> str:
    """A path of ours from the package on; of others the last two parts: enough to find it, and nothing about this machine."""
    if filename.startswith(_PACKAGE):
        return f"gemma_grpo/{Path(filename).relative_to(_PACKAGE).as_posix()}"
    return "/".join(Path(filename).parts[-2:])
