"""Every way known to us in which a reward function misbehaves, and the exact words that say so.

The functions are asked for two groups of three completions, of prompts "p" and "q".
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import fcntl
import math
import os
import re
import resource
import signal
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemma_grpo.reward.isolated import ANSWER_LIMIT
from gemma_grpo.types import Completion, Prompt, RolloutGroup

HANGS_SECONDS = 0.3
"""Deadline of what never ends."""
NUMBER = r"Return a number, or None for not scored\."
FINITE = r"Return a finite number, or None for not scored\."
BELOW = r"Return a number below 3\.4e38, or None for not scored\."
LIST = r"Return a list with one number or None per completion\."
COUNT = r"for 6 completions\. Return one score per completion\."
WHERE = "on 6 completions of prompts p, q"
SKIP = r"or set reward_function\.on_failure=skip\."


@dataclass(frozen=True)
class Bad:
    """A function, what is said of it after its name, and where it can be tried."""

    function: Callable[..., Any]
    text: str
    """A regular expression for everything after "reward 'name' "."""
    skipped: int = 6
    """Completions that go without a score where it may be skipped."""
    here: bool = True
    """Can be called without a process of its own: it ends, and leaves the caller alive."""
    timeout: float = 60.0


def groups() -> list[RolloutGroup]:
    completions = tuple(Completion(text, (*range(size), 106), (0.0,) * (size + 1), "stop") for size, text in enumerate(("", "a", "bb")))
    return [RolloutGroup(Prompt(name, "test", ({"role": "user", "content": "x"},), (2,), name), completions, 0) for name in ("p", "q")]


def value(bad: Any, shown: str, remedy: str = NUMBER) -> Bad:
    """One unusable score in the second place, made anew in each call."""

    def function(completions: list[Any], **columns: Any) -> list[Any]:
        asked_for_all = len(completions) == 6
        return [0.5, bad() if asked_for_all else 0.5, *[0.25] * (len(completions) - 2)]

    return Bad(function, rf"returned {shown} for 1 of 6 completions \(index 1, prompt p\)\. {remedy}", skipped=1)


def returning(result: Callable[[int], Any], text: str, skipped: int = 6) -> Bad:
    """A result made from the number of completions."""
    return Bad(lambda completions, **columns: result(len(completions)), rf"returned {text}", skipped)


def raising(error: Callable[[], BaseException], text: str, *, here: bool = True) -> Bad:
    def function(**columns: Any) -> list[float]:
        raise error()

    return Bad(function, _raised(text), here=here)


def acting(action: Callable[[], Any], text: str, **more: Any) -> Bad:
    """Something done where scores were asked for; not to be tried without a process of its own."""

    def function(completions: list[Any], **columns: Any) -> list[float]:
        action()
        return [0.0] * len(completions)

    return Bad(function, text, here=False, **more)


def hanging(action: Callable[[], Any]) -> Bad:
    text = rf"exceeded 0\.3 s {WHERE}: killed\. Raise reward_function\.timeout, mend it, {SKIP}"
    return acting(action, text, timeout=HANGS_SECONDS)


def ending(action: Callable[[], Any], how: str) -> Bad:
    return acting(action, rf"{how} {WHERE}\. Mend it, {SKIP}")


def _raised(text: str) -> str:
    return rf"raised {text}\. It was scoring 6 completions of prompts p, q\. Mend it, or return None there\."


# ---- what needs more than a line


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class OwnBase(BaseException):
    pass


async def _later(completions: list[Any], **columns: Any) -> list[float]:
    await asyncio.sleep(0)
    raise ConnectionError("no route to the judge")


async def _cancelled(**columns: Any) -> list[float]:
    raise asyncio.CancelledError


async def _yielding(**columns: Any) -> Any:
    yield 1.0


async def _asleep(**columns: Any) -> list[float]:
    await asyncio.sleep(600)
    return []


def _counting(count: int) -> Iterator[float]:
    yield from [0.0] * count


def _recursing(**columns: Any) -> Any:
    return _recursing(**columns)


def _spin() -> None:
    while True:
        pass


def _backtrack() -> None:
    """For longer than anybody will live, in C, with the interpreter's lock held."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    re.match(r"(a+)+$", "a" * 64 + "b")


def _deaf() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    while True:
        with suppress(BaseException):
            time.sleep(600)


def _deadlock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def _print_for_ever() -> None:
    while True:
        print("x" * 10_000)


def _segfault() -> None:
    faulthandler.disable()  # the test's own: it would write past the process's output
    ctypes.string_at(0)


def _abort() -> None:
    faulthandler.disable()
    os.abort()


def _exhaust() -> None:
    """All the memory there is, where that is a quarter of a gigabyte more than there was."""
    size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, size + 2**28))
    kept = []
    while True:
        kept.append(bytearray(2**26))


def _pipes() -> dict[int, int]:
    """Number -> pipe, of those that can be written to, beyond the standard streams."""
    found = {}
    for number in range(3, 256):
        with suppress(OSError):
            status = os.fstat(number)
            if stat.S_ISFIFO(status.st_mode) and fcntl.fcntl(number, fcntl.F_GETFL) & os.O_WRONLY:
                found[number] = status.st_ino
    return found


OTHERS_PIPES = set(_pipes().values())
"""Such as the one to a terminal's pager."""


def _say(data: bytes) -> None:
    """Write to the pipe for the answer, whichever that is."""
    for number in [number for number, pipe in _pipes().items() if pipe not in OTHERS_PIPES]:
        left = memoryview(data)
        while left:
            left = left[os.write(number, left) :]


VALUES: dict[str, Bad] = {
    "nan": value(lambda: math.nan, "nan", FINITE),
    "infinity": value(lambda: math.inf, "inf", FINITE),
    "minus infinity": value(lambda: -math.inf, "-inf", FINITE),
    "infinite in float32": value(lambda: 1e39, r"1e\+39, which is infinite in float32,", BELOW),
    "minus infinite in float32": value(lambda: -1e39, r"-1e\+39, which is infinite in float32,", BELOW),
    "an integer beyond float": value(lambda: 10**400, "inf", FINITE),
    "numpy's nan": value(lambda: np.float32("nan"), "nan", FINITE),
    "a tensor's nan": value(lambda: torch.tensor(math.nan), "nan", FINITE),
    "true": value(lambda: True, r"True \(bool\)"),
    "numpy's true": value(lambda: np.bool_(True), r"(np\.)?True_? \(bool_?\)"),
    "a tensor's true": value(lambda: torch.tensor(True), r"tensor\(True\) \(Tensor\)"),
    "a number as text": value(lambda: "1.0", r"'1\.0' \(str\)"),
    "bytes": value(lambda: b"1", r"b'1' \(bytes\)"),
    "a complex number": value(lambda: 1j, r"1j \(complex\)"),
    "numpy's complex number": value(lambda: np.complex64(1), r"(np\.complex64\()?\(?1\+0j\)?\)? \(complex64\)"),
    "a decimal": value(lambda: Decimal("1"), r"Decimal\('1'\) \(Decimal\)"),
    "a list of one": value(lambda: [1.0], r"\[1\.0\] \(list\)"),
    "a pair": value(lambda: (1.0, "because"), r"\(1\.0, 'because'\) \(tuple\)"),
    "a mapping": value(lambda: {"score": 1.0}, r"\{'score': 1\.0\} \(dict\)"),
    "a tensor of one": value(lambda: torch.tensor([1.0]), r"tensor\(\[1\.\]\) \(Tensor\)"),
    "an array of text": value(lambda: np.array("1"), r"array\('1', dtype='<U1'\) \(ndarray\)"),
    "a function": value(lambda: len, r"<built-in function len> \(builtin_function_or_method\)"),
    "an error that was caught": value(lambda: ValueError("no"), r"ValueError\('no'\) \(ValueError\)"),
    "a type": value(lambda: float, r"<class 'float'> \(type\)"),
    "a column": returning(
        lambda n: np.zeros((n, 1)), rf"\[0\.0\] \(list\) for 6 of 6 completions \(first index 0, prompt p\)\. {NUMBER}"
    ),
}
"""Single scores."""

RESULTS: dict[str, Bad] = {
    "nothing": returning(lambda n: None, rf"None \(NoneType\)\. {LIST}"),
    "one number": returning(lambda n: 1.0, rf"1\.0 \(float\)\. {LIST}"),
    "a tensor without axes": returning(lambda n: torch.tensor(1.0), rf"tensor\(1\.\) \(Tensor\)\. {LIST}"),
    "a text": returning(lambda n: "1" * n, rf"'111111' \(str\)\. {LIST}"),
    "a mapping": returning(lambda n: dict.fromkeys(range(n), 1.0), rf"\{{0: 1\.0, .* \(dict\)\. {LIST}"),
    "a set": returning(lambda n: set(range(n)), rf"\{{0, 1, 2, 3, 4, 5\}} \(set\)\. {LIST}"),
    "a range": returning(range, rf"range\(0, 6\) \(range\)\. {LIST}"),
    "a deque": returning(lambda n: deque([0.0] * n), rf"deque\(\[0\.0, .* \(deque\)\. {LIST}"),
    "a generator": returning(_counting, rf"<generator object _counting at .* \(generator\)\. {LIST}"),
    "an iterator": returning(lambda n: iter([0.0] * n), rf"<list_iterator object at .* \(list_iterator\)\. {LIST}"),
    "an async generator": Bad(_yielding, rf"returned <async_generator object .* \(async_generator\)\. {LIST}"),
    "no score": returning(lambda n: [], rf"0 scores {COUNT}"),
    "one score for all": returning(lambda n: [1.0], rf"1 scores {COUNT}"),
    "one too few": returning(lambda n: [0.0] * (n - 1), rf"5 scores {COUNT}"),
    "one too many": returning(lambda n: [0.0] * (n + 1), rf"7 scores {COUNT}"),
    "a list for each group": returning(lambda n: [[0.0] * 3] * (n // 3), rf"2 scores {COUNT}"),
    "a tensor of groups": returning(lambda n: torch.zeros(n // 3, 3), rf"2 scores {COUNT}"),
    "a million scores": returning(lambda n: np.broadcast_to(0.0, 10**6), rf"1000000 scores {COUNT}"),
}
"""What is no list of six scores."""

ERRORS: dict[str, Bad] = {
    "an error": raising(lambda: ZeroDivisionError("no replies"), "ZeroDivisionError: no replies"),
    "an error without words": raising(ValueError, "ValueError"),
    "an error that cannot be shown": raising(UnspeakableError, "UnspeakableError: its message cannot be shown: RuntimeError"),
    "an error of many words": raising(lambda: ValueError("x" * 10**6), f"ValueError: {'x' * 500}"),
    "exit with success": raising(lambda: SystemExit(0), "SystemExit: 0"),
    "exit": raising(SystemExit, "SystemExit"),
    "the end of a generator": raising(GeneratorExit, "GeneratorExit"),
    "the end of an iteration": raising(StopIteration, "StopIteration"),
    "an error beside Exception": raising(lambda: OwnBase("own"), "OwnBase: own"),
    "out of memory": raising(MemoryError, "MemoryError"),
    "a failed assertion": raising(AssertionError, "AssertionError"),
    "endless recursion": Bad(_recursing, _raised("RecursionError: .*")),
    "an async error": Bad(_later, _raised("ConnectionError: no route to the judge")),
    "an async cancellation": Bad(_cancelled, _raised("CancelledError")),
    "an interruption of its own": raising(lambda: KeyboardInterrupt("mine"), "KeyboardInterrupt: mine", here=False),
    "input": acting(input, _raised("EOFError: EOF when reading a line")),
    "memory without end": acting(_exhaust, _raised("MemoryError")),
}
"""What is raised."""

PROCESSES: dict[str, Bad] = {
    "sleep": hanging(lambda: time.sleep(600)),
    "an async sleep": Bad(_asleep, hanging(_spin).text, here=False, timeout=HANGS_SECONDS),
    "a loop": hanging(_spin),
    "a loop in C": hanging(_backtrack),
    "deaf to signals": hanging(_deaf),
    "a deadlock": hanging(_deadlock),
    "print without end": hanging(_print_for_ever),
    "stopped by itself": hanging(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "ended with success": ending(lambda: os._exit(0), "ended its process with exit code 0"),
    "ended": ending(lambda: os._exit(3), "ended its process with exit code 3"),
    "a segmentation fault": ending(_segfault, "died by SIGSEGV"),
    "an abort": ending(_abort, "died by SIGABRT"),
    "killed": ending(lambda: os.kill(os.getpid(), signal.SIGKILL), r"died by SIGKILL \(probably out of memory\)"),
    "a real-time signal": ending(lambda: os.kill(os.getpid(), 40), "died by signal 40"),
    "everything closed": ending(lambda: os.closerange(0, 4096), "ended its process with exit code 1"),
    "words in the answer": ending(lambda: _say(b"[ 0%]"), "sent back what is no JSON"),
    "another answer": ending(lambda: _say(b"[1, 2]\n"), "sent back what is no answer"),
    "another answer's length": ending(lambda: _say(b"[[1.0], []]\n"), "sent back what is no answer"),
    "an answer without end": ending(lambda: _say(bytes(ANSWER_LIMIT + 1)), f"sent back more than {ANSWER_LIMIT} bytes"),
}
"""What only a process of its own survives."""

KINDS: dict[str, Bad] = {
    f"{section}: {name}": bad
    for section, table in {"score": VALUES, "result": RESULTS, "raise": ERRORS, "process": PROCESSES}.items()
    for name, bad in table.items()
}
HERE = sorted(name for name, bad in KINDS.items() if bad.here)
