"""One call in a process of its own, killed when it is late: for other people's code, which may hang, crash or print without end.

Owns that process: its start, its deadline, what it prints, and the end of it and of all it started. What is called, and what an answer
means, is the caller's. Arguments are had by forking, nothing is serialised for them; the answer is one line of JSON. On Linux the
process dies with the trainer, even when that is killed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

from gemma_grpo.escapes import printable
from gemma_grpo.redact import redact
from gemma_grpo.stopping import SIGNALS, check

OUTPUT_LIMIT = 64 * 1024
"""Bytes of what one call prints that are passed on to stderr; the rest is counted."""
ANSWER_LIMIT = 16 * 2**20
"""Bytes of an answer: far more than scores need."""
POLL_SECONDS = 0.05
"""How long a request to stop, the deadline or the end of the process may go unnoticed."""
_CHUNK = 64 * 1024
_ROUNDS = 20
"""How often those are looked for who left the group: what they started meanwhile is found in the next round."""
_KEPT_AFTER_ANSWER = 60.0
"""Seconds; it is killed long before. Until then it stands above what it started, which can be found so."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# looked up here: after a fork, the loader's lock may be held by a thread that is no more
_prctl: Any = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_inherited: list[Any] = []
"""In the process: the trainer's streams. What is in their buffers is the trainer's to write, and would be written if they were let go."""


class NoAnswerError(Exception):
    """The process gave no answer; the message says how it ended, after "the function"."""


class LateError(NoAnswerError):
    """It was killed at its deadline."""


def call_isolated(work: Callable[[], Any], timeout: float) -> Any:
    """What `work` returns, a JSON value, from a process that has `timeout` seconds and is gone afterwards, however this ends.

    Raises NoAnswerError; OSError when no process can be had; Stopped soon after the run was asked to stop.
    """
    child: _Child | None = None
    try:
        with _signals_held():  # until somebody knows the process that has to be ended
            child = _started(work)
        return child.answer(timeout)
    finally:
        if child is not None:
            with _signals_held():
                child.end()


class _Child:
    """The process, seen from the trainer."""

    def __init__(self, pid: int, answers: int, output: int) -> None:
        self.pid, self.answers, self.output = pid, answers, output
        self.line, self.printed, self.num_left_out = bytearray(), bytearray(), 0
        self.ended = False
        self.exit_code: int | None = None
        """Negative: the signal it died by; None while it runs, and when somebody else heard of its end first."""
        for pipe in (answers, output):
            os.set_blocking(pipe, False)

    def answer(self, timeout: float) -> Any:
        """Wait for the line of JSON, and read what is printed meanwhile."""
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for pipe in (self.answers, self.output):
                selector.register(pipe, selectors.EVENT_READ)
            while True:
                check()
                over = self._has_ended() or time.monotonic() >= deadline  # asked first: what was written before is read below
                for key, _ in selector.select(0 if over else min(POLL_SECONDS, max(0.0, deadline - time.monotonic()))):
                    if not self._read(key.fd):
                        selector.unregister(key.fd)
                if len(self.line) > ANSWER_LIMIT:
                    raise NoAnswerError(f"sent back more than {ANSWER_LIMIT} bytes")
                if b"\n" in self.line:
                    return self._parsed()
                if over:
                    raise NoAnswerError(self._how_it_ended()) if self.ended else LateError(f"exceeded {timeout} s")

    def end(self) -> None:
        """Kill it and all it started, wait for its end, pass on what it printed."""
        if not self.ended:
            self._kill_group(signal.SIGSTOP)  # nobody starts anything more while those are looked for who left the group
            killed: set[int] = set()
            for _ in range(_ROUNDS):
                found = descendants(self.pid) - killed
                for pid in found:
                    _kill(pid, signal.SIGKILL)
                killed |= found
                if not found:
                    break
        self._kill_group(signal.SIGKILL)
        if not self.ended:
            _kill(self.pid, signal.SIGKILL)  # before it had a group of its own
            with suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self.ended = True
        # what is still in the pipe; not for ever, as somebody who escaped may go on printing
        for _ in range(OUTPUT_LIMIT // _CHUNK + 1):
            self._read(self.output)
        os.close(self.answers)
        os.close(self.output)
        self._pass_on()

    def _kill_group(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):  # its number is not given to others while anybody is in it
            os.killpg(self.pid, number)

    def _read(self, pipe: int) -> bool:
        """Take what is in the pipe; False when nobody can write to it any more."""
        try:
            data = os.read(pipe, _CHUNK)
        except BlockingIOError:
            return True
        if pipe == self.answers:
            self.line += data
        else:
            kept = data[: OUTPUT_LIMIT - len(self.printed)]
            self.printed += kept
            self.num_left_out += len(data) - len(kept)
        return bool(data)

    def _has_ended(self) -> bool:
        if not self.ended:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self.ended = True
            else:
                self.ended = pid != 0
                self.exit_code = os.waitstatus_to_exitcode(status) if pid else None
        return self.ended

    def _how_it_ended(self) -> str:
        if self.exit_code is None:
            return "ended its process"
        if self.exit_code >= 0:
            return f"ended its process with exit code {self.exit_code}"
        try:
            name = signal.Signals(-self.exit_code).name
        except ValueError:  # a real-time signal
            name = f"signal {-self.exit_code}"
        return f"died by {name}" + (" (probably out of memory)" if name == "SIGKILL" else "")

    def _parsed(self) -> Any:
        try:
            return json.loads(self.line.partition(b"\n")[0])
        except (ValueError, RecursionError):
            raise NoAnswerError("sent back what is no JSON") from None

    def _pass_on(self) -> None:
        if sys.stderr is None or not self.printed or _is_closed(sys.stderr):
            return
        text = self.printed.decode("utf-8", "replace")
        shown = "\n".join(printable(line) for line in redact(text).split("\n"))
        end = "" if shown.endswith("\n") else "\n"
        more = f"... {self.num_left_out} bytes more left out\n" if self.num_left_out else ""
        with suppress(OSError, ValueError):  # a closed stderr must not cost the answer
            sys.stderr.write(f"{shown}{end}{more}")


def _is_closed(stream: TextIO) -> bool:
    """Whether the file behind a stream is closed. What is written there all the same stays in its buffer, and ends the program with 120."""
    try:
        number = stream.fileno()
    except (OSError, ValueError, AttributeError):
        return False  # a notebook's own, with no file behind it
    try:
        os.fstat(number)
    except OSError:
        return True
    return False


def _started(work: Callable[[], Any]) -> _Child:
    answers, to_answers = _pipe()
    output, to_output = _pipe()
    parent = os.getpid()
    try:
        pid = os.fork()
        if pid == 0:
            _serve(work, (answers, output), to_answers, to_output, parent)
    except OSError:
        os.close(answers)
        os.close(output)
        raise
    finally:
        os.close(to_answers)
        os.close(to_output)
    return _Child(pid, answers, output)


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are not numbered like the standard streams, which a trainer may have closed."""
    low: list[int] = []
    while min(ends := os.pipe()) <= 2:
        low.extend(ends)
    for end in low:
        os.close(end)
    return ends


def _serve(work: Callable[[], Any], not_mine: tuple[int, int], answers: int, output: int, parent: int) -> NoReturn:
    """The process itself: it never comes back, and runs none of what the trainer left to be done at its exit."""
    code = 1
    _inherited.extend((sys.stdout, sys.stderr))
    try:
        for pipe in not_mine:
            os.close(pipe)
        _settle(output, parent)
        line = memoryview(json.dumps(work(), allow_nan=False).encode() + b"\n")
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        while line:
            line = line[os.write(answers, line) :]
        time.sleep(_KEPT_AFTER_ANSWER)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _settle(output: int, parent: int) -> None:
    """Let go of all that is the trainer's: terminal, signals, output, threads."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what its children leave behind stays below it, also what made itself a session
    if os.getppid() != parent:
        os._exit(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    for source in {nothing, output} - {0, 1, 2}:
        os.close(source)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, "utf-8", "backslashreplace", closefd=False) for number in (1, 2))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")  # its memory is mostly the trainer's: when there is too little, this one is to go
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)  # OpenMP's other threads are not there after a fork, and would be waited for
    gc.freeze()  # what the trainer left to be collected may have to do with a device


@contextmanager
def _signals_held() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def descendants(root: int) -> set[int]:
    """What a process started, and what that started; empty where there is no /proc to ask."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b") ")[2].split()[1])  # a program's name may hold anything, brackets too
                children.setdefault(parent, []).append(int(name))
    found: set[int] = set()
    waiting = [root]
    while waiting:
        new = [pid for pid in children.get(waiting.pop(), ()) if pid not in found]
        found.update(new)
        waiting += new
    return found
