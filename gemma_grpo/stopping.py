"""Asking a run to stop: a first SIGINT, SIGTERM or SIGHUP, or its time being up, is noticed between two pieces of work.

A second signal ends the process at once. Owns the request and who hears of it; what is saved then is the trainer's. One request holds
for the whole process, as a signal does.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from gemma_grpo.launched import is_first

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the same command goes on with the run."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop. Not an Exception: a reward's own `except Exception` must not keep a run going."""


class _Request:
    def __init__(self) -> None:
        self.reason: str | None = None
        self.deadline: float | None = None
        self.at_once = 0
        self.held = 0


_request = _Request()


def heard_signals() -> list[signal.Signals]:
    """SIGNALS, without a SIGHUP that nohup has turned off: that run is to outlive its terminal."""
    return [number for number in SIGNALS if number in SIGNALS[:2] or signal.getsignal(number) != signal.SIG_IGN]


def requested() -> str | None:
    """Why the run was asked to stop; None where it was not."""
    if _request.reason is None and _request.deadline is not None and time.monotonic() >= _request.deadline:
        _request.reason = "because its time is up (max_minutes)"
    return _request.reason


def check() -> None:
    """Raise Stopped if the run was asked to stop. To be called between pieces of work: after each token, each micro-batch."""
    reason = requested()
    if reason is not None and not _request.held:
        raise Stopped(reason)


@contextmanager
def held() -> Iterator[None]:
    """Around a piece of work that must come to its end, since others take part in it: a request to stop waits for as long."""
    _request.held += 1
    try:
        yield
    finally:
        _request.held -= 1


@contextmanager
def interruptible() -> Iterator[None]:
    """Around what cannot be asked and changes nothing that would have to be undone, such as other people's code: stopped at once."""
    _request.at_once += 1
    try:
        check()
        yield
    finally:
        _request.at_once -= 1


@contextmanager
def listening(max_minutes: float | None = None) -> Iterator[None]:
    """Hear signals, and stop when `max_minutes` have gone by; on leaving, all is as before. Only a main thread hears signals."""
    outer = vars(_request).copy()
    _request.reason, _request.at_once = None, 0
    _request.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, _heard) for number in heard_signals()} if main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by others than Python
        vars(_request).update(outer)


def _heard(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if _request.reason is not None:
        _say(f"second signal ({name}): ended at once; the last checkpoint is what it was.")
        os._exit(EXIT_CODE)
    _request.reason = f"by {name}"
    _say(f"{name}: stopping after this piece of work; once more ends at once.")
    if _request.at_once:
        raise Stopped(_request.reason)


def _say(text: str) -> None:
    """Past sys.stderr, which may be in the middle of a line, or closed. Of several ranks, the first one's."""
    with suppress(OSError):
        if is_first():
            os.write(2, f"\n{text}\n".encode())
