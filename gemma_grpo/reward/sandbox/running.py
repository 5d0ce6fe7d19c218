"""The outside of the sandbox: starts it, reads what comes back within bounds, ends it, and says how a program ended.

Owns the limits and the words for how programs end. Nothing runs where the machine cannot shut a program in: there is no second, weaker way.
"""

from __future__ import annotations

import errno
import json
import math
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from signal import SIGKILL, Signals
from typing import IO, Any, Literal

from gemma_grpo.reward.isolated import descendants
from gemma_grpo.reward.sandbox.cell import MIB, SHUT
from gemma_grpo.stopping import check

Kind = Literal["ended", "syntax", "error", "refused", "exit", "crash", "time", "memory", "output", "long"]
"""How a program ended: by itself after its last call; or with what it was that ended it. "refused": the sandbox denied it something."""

PROGRAM_LIMIT = 100_000
"""Characters of a program; what is longer is not run."""
RESULTS_LIMIT, OUTPUT_LIMIT = 1 * MIB, 64 * 1024
"""Bytes a program may send back, and print; with more it is ended."""
START_SECONDS = 120.0
"""A machine under load may take so long to start it."""
CLOCK = 3.0
"""A machine that has other work too gives a program its seconds later; what a reply is worth must not depend on that."""
POLL_SECONDS, STEP_SECONDS = 0.05, 0.25
"""How often a program is looked at; and how much of the clock one look counts at most: when a machine stood still, or had no processor for
the watcher, it had none for the program."""
_END_SECONDS = 5.0
_ATTEMPTS = 3
_DENIED = (
    *(errno.EPERM, errno.EACCES, errno.EROFS, errno.ENETUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL, errno.EAGAIN, errno.ENFILE),
    *(errno.EMFILE, errno.EFBIG, errno.ENOSPC, errno.ENOSYS, errno.ENOENT, errno.ECHILD, errno.ESRCH),
)
_DENIED_TYPES = ("gaierror", "PermissionError", "BlockingIOError")
REMEDY = (
    "Programs are run only where they can be shut in. Allow user namespaces (sysctl user.max_user_namespaces above 0; on Ubuntu also "
    "kernel.apparmor_restrict_unprivileged_userns=0; in Docker --security-opt seccomp=unconfined --security-opt systempaths=unconfined), "
    "or leave unit_tests out of `reward`."
)


class SandboxError(ValueError):
    """This machine cannot shut a program in; the message says why and what would help."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use."""

    seconds: float = 5.0
    """Of the processor, for each process; of the clock CLOCK times as many."""
    memory_mib: int = 512
    """Address space of a process; and what all of them hold in memory."""
    file_mib: int = 4
    files_mib: int = 16
    """One file, and all files together; they are held in memory."""
    processes: int = 16
    """Processes and threads, three of the sandbox's own included."""
    open_files: int = 48


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program."""

    kind: Kind
    detail: str = ""
    """Why, in a few words of the program's own error, or the signal."""
    values: Mapping[int, Any] = field(default_factory=dict)
    """Call -> what it returned, as cell.py sends it; only of a program that ended by itself."""


_KILLED = Outcome("crash", "SIGKILL")


def run_program(program: str, calls: Sequence[str], limits: Limits | None = None) -> Outcome:
    """Run a program, then evaluate each call in it, shut in and alone. It is gone afterwards, with all it started.

    Raises SandboxError where this machine cannot shut it in; Stopped soon after the run was asked to stop.
    """
    limits = limits or Limits()
    if len(program) > PROGRAM_LIMIT:
        return Outcome("long", f"{len(program)} characters, more than {PROGRAM_LIMIT}")
    for attempt in range(_ATTEMPTS):
        try:
            with _Cell(_job(program, calls, limits), limits) as cell:
                outcome = cell.outcome(len(calls))
            # a machine short of memory kills these programs first: nothing is known of the program until that is ruled out
            if outcome != _KILLED or attempt == _ATTEMPTS - 1:
                return outcome
        except SandboxError:
            if attempt == _ATTEMPTS - 1 or sys.platform != "linux":
                raise
            time.sleep(0.2 * (attempt + 1))  # a process table that was full for a moment is no reason to end a run
    raise AssertionError("not reached")


@lru_cache(maxsize=1)
def why_not() -> str | None:
    """Why programs cannot be run here; None where they can. Tried once."""
    try:
        outcome = run_program("answer = 6 * 7", ["answer"])
    except SandboxError as error:
        return str(error)
    return None if outcome.values.get(0) == 42 else f"a program that only multiplies ended with {outcome.kind} ({outcome.detail})"


def sandbox_status() -> tuple[Literal["ok", "fail"], str, tuple[str, ...]]:
    """The doctor's line: how it stands, in a sentence, and what mends it."""
    why = why_not()
    if why is None:
        return "ok", "Programs can be shut in for the reward unit_tests: no network, no files, limits on time and memory", ()
    what, _, remedy = why.partition(". ")
    return "fail", what, (remedy,) if remedy else ()


def _job(program: str, calls: Sequence[str], limits: Limits) -> bytes:
    given: dict[str, Any] = {"program": program, "calls": list(calls), "cpu_seconds": math.ceil(limits.seconds)}
    given |= {name: getattr(limits, name) for name in ("memory_mib", "file_mib", "files_mib", "processes", "open_files")}
    return json.dumps(given | {"place": os.path.realpath(tempfile.gettempdir())}).encode()


class _Clock:
    """Seconds as the watcher had them."""

    def __init__(self, seconds: float) -> None:
        self.left, self.looked = seconds, time.monotonic()

    def is_over(self) -> bool:
        now = time.monotonic()
        self.left -= min(now - self.looked, STEP_SECONDS)
        self.looked = now
        return self.left <= 0


class _Cell:
    """One program's processes, seen from the trainer."""

    def __init__(self, job: bytes, limits: Limits) -> None:
        if sys.platform != "linux":
            raise SandboxError(f"the code sandbox needs Linux, and this is {sys.platform}. {REMEDY}")
        self.limits, self.job = limits, job
        self.status, self.results, self.printed = bytearray(), bytearray(), bytearray()
        self.shut = False
        self.process, self.pipes = _started()

    def __enter__(self) -> _Cell:
        return self

    def __exit__(self, *_: Any) -> None:
        self._end()

    def outcome(self, num_calls: int) -> Outcome:
        """Wait for its end, or bring it about. Raises SandboxError when it could not be shut in."""
        with suppress(BrokenPipeError):
            assert self.process.stdin is not None
            self.process.stdin.write(self.job)
            self.process.stdin.close()
        broken = self._wait()
        if not self.shut:
            said = self.status.decode("utf-8", "replace").strip() or f"it did not start within {START_SECONDS:g} s"
            raise SandboxError(f"a program cannot be shut in on this machine ({said}). {REMEDY}")
        return broken or self._read_outcome(num_calls)

    def _wait(self) -> Outcome | None:
        """None when it ended by itself, and all that it was shut in with."""
        clock = _Clock(START_SECONDS)
        with selectors.DefaultSelector() as selector:
            for pipe, kept in self.pipes.items():
                selector.register(pipe, selectors.EVENT_READ, kept)
            while selector.get_map() or self._ended(0) is None:
                check()
                if clock.is_over():
                    return Outcome("time", f"{CLOCK * self.limits.seconds:g} s")
                if not selector.get_map():  # a loaded machine takes its time to take namespaces down; or the program lets nothing be heard
                    self._ended(POLL_SECONDS)
                for key, _ in selector.select(POLL_SECONDS if selector.get_map() else 0):
                    data = os.read(key.fd, 64 * 1024)
                    getattr(self, key.data).extend(data)
                    if not data:
                        selector.unregister(key.fileobj)
                if not self.shut and bytes(self.status) == SHUT:
                    self.shut, clock = True, _Clock(CLOCK * self.limits.seconds)
                if broken := self._over_a_bound():
                    return broken
        return None

    def _over_a_bound(self) -> Outcome | None:
        if len(self.printed) > OUTPUT_LIMIT:
            return Outcome("output", f"printed more than {OUTPUT_LIMIT} bytes")
        if len(self.results) > RESULTS_LIMIT:
            return Outcome("output", f"sent back more than {RESULTS_LIMIT} bytes")
        held = sum(map(_resident, descendants(self.process.pid)))
        if held > (self.limits.memory_mib + 64) * MIB:
            return Outcome("memory", f"all its processes held {held // MIB} MiB")
        return None

    def _read_outcome(self, num_calls: int) -> Outcome:
        code = self._ended(0)
        lines = [line for line in map(_parsed, bytes(self.results).split(b"\n")) if line]
        if not any("begun" in line for line in lines):
            raise SandboxError(f"a program was shut in and did not begin ({self._said() or f'exit code {code}'}). {REMEDY}")
        if syntax := next((line["syntax"] for line in lines if "syntax" in line), None):
            return Outcome("syntax", _shown(syntax))
        if code is not None and (code > 128 or code < 0):  # of the program; of the sandbox itself
            return _of_signal(code - 128 if code > 0 else -code)
        error = next((line["error"] for line in lines if "error" in line and "call" not in line), None)
        if error is not None:
            return _of_error(error)
        answered = sum("call" in line for line in lines)
        if code != 0 or answered < num_calls or not any("ran" in line for line in lines):
            return Outcome("exit", f"exit code {code} after {answered} of {num_calls} calls {self._said()}".rstrip())
        values: dict[int, Any] = {}
        failed: Any = None
        for line in lines:
            if isinstance(call := line.get("call"), int):
                if "value" in line:
                    values.setdefault(call, line["value"])
                else:
                    failed = failed or line.get("error")
        if failed is None:
            return Outcome("ended", values=values)
        said = _of_error(failed)
        return Outcome(said.kind, said.detail, values)

    def _said(self) -> str:
        """The last line it printed."""
        return bytes(self.printed).decode("utf-8", "replace").strip().rpartition("\n")[2][:100]

    def _ended(self, seconds: float) -> int | None:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def _end(self) -> None:
        """Kill what is inside first, so that the supervisor reaps it; then the supervisor."""
        for number in descendants(self.process.pid):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(number, SIGKILL)
        if self._ended(_END_SECONDS) is None:
            self.process.kill()
            self.process.wait()
        for pipe in self.pipes:
            pipe.close()
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()


def _started() -> tuple[subprocess.Popen[bytes], dict[IO[bytes], str]]:
    status, to_status = os.pipe()
    results, to_results = os.pipe()
    # -I: no variable, no user folder is looked at; -S: no package of the environment is to be had
    words = [sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name("cell.py")), *map(str, (os.getpid(), to_status, to_results))]
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={},
            cwd="/",
            pass_fds=(to_status, to_results),
            start_new_session=True,
        )
    except OSError as error:
        os.close(status)
        os.close(results)
        raise SandboxError(f"a program cannot be given a process ({error}). {REMEDY}") from error
    finally:
        os.close(to_status)
        os.close(to_results)
    assert process.stdout is not None
    return process, {os.fdopen(status, "rb", 0): "status", os.fdopen(results, "rb", 0): "results", process.stdout: "printed"}


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line the program sent, or anything else it wrote there: that counts for nothing."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _shown(error: Any) -> str:
    kind, _, message = error if isinstance(error, list) and len(error) == 3 else ("error", None, error)
    return f"{kind}: {message}"[:200]


def _of_error(error: Any) -> Outcome:
    kind, number, _ = error if isinstance(error, list) and len(error) == 3 else ("error", None, "")
    if kind == "MemoryError":
        return Outcome("memory", _shown(error))
    if kind == "SystemExit":
        return Outcome("exit", _shown(error))
    return Outcome("refused" if number in _DENIED or kind in _DENIED_TYPES else "error", _shown(error))


def _of_signal(number: int) -> Outcome:
    try:
        name = Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return Outcome("time" if name == "SIGXCPU" else "crash", name)


def _resident(pid: int) -> int:
    """Bytes a process holds in memory; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError, ValueError):
        return 0
