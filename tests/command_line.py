"""The command line in a process of its own: started as a user starts it, or forked from this one, which spares the imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gemma_grpo.grpo.trainer  # before it is forked
import gemma_grpo.monitor.report  # noqa: F401
from gemma_grpo.cli import main
from gemma_grpo.stopping import SIGNALS

PATIENCE = 120.0
"""Seconds after which a process that should have ended is taken for one that hangs."""


@dataclass
class Process:
    """A running command line, with what it prints in two files."""

    pid: int
    out_file: Path
    err_file: Path
    code: int | None = None
    """What it ended with; minus the signal's number where one ended it."""

    @property
    def out(self) -> str:
        return self.out_file.read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        return self.err_file.read_text(encoding="utf-8", errors="replace")

    def running(self) -> bool:
        if self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code is None

    def wait_until(self, reached: Callable[[], Any]) -> bool:
        """Whether it came to be while the process ran."""
        deadline = time.monotonic() + PATIENCE
        while self.running():
            if reached():
                return True
            assert time.monotonic() < deadline, f"hangs:\n{self.out}\n{self.err}"
            time.sleep(0.001)
        return False

    def end(self) -> float:
        """Seconds until it ended by itself."""
        started = time.monotonic()
        try:
            self.wait_until(lambda: False)
        finally:
            if self.code is None:
                os.kill(self.pid, signal.SIGKILL)
        return time.monotonic() - started

    def signal(self, number: int) -> None:
        if self.running():
            os.kill(self.pid, number)


def started(arguments: list[str], folder: Path) -> Process:
    """`python -m gemma_grpo.cli`, as a user starts it."""
    process = Process(0, folder / "out", folder / "err")
    with process.out_file.open("wb") as out, process.err_file.open("wb") as err:
        process.pid = subprocess.Popen([sys.executable, "-m", "gemma_grpo.cli", *arguments], stdout=out, stderr=err).pid
    return process


def forked(arguments: list[str], folder: Path, *, prints: dict[int, int] | None = None, before: Callable[[], Any] = str) -> Process:
    """The same program in a fork; `before` runs in it first, `prints` are descriptors for 1 and 2 instead of the files."""
    process = Process(0, folder / "out", folder / "err")
    process.out_file.touch()
    process.err_file.touch()
    process.pid = os.fork()
    if process.pid == 0:
        _become(arguments, {1: process.out_file, 2: process.err_file, **(prints or {})}, before)
    return process


def _become(arguments: list[str], prints: dict[int, Any], before: Callable[[], Any]) -> None:
    code: Any = 99
    try:
        for number in SIGNALS:  # as a new process has them
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        before()
        for number, file in prints.items():
            os.dup2(file if isinstance(file, int) else os.open(file, os.O_WRONLY | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", encoding="utf-8") for number in (1, 2))
        sys.argv = ["gemma-grpo", *arguments]
        main()
    except SystemExit as end:
        code = end.code
        sys.stderr.flush()
    finally:
        os._exit(code if isinstance(code, int) else 98)


def steps_saved(run: Path) -> int:
    """Steps of a stopped run, which its files must agree on: run.json, the log and the newest checkpoint."""
    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    steps = int(info.get("steps") or 0)
    assert len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == steps
    newest = max((path.name for path in (run / "checkpoints").glob("step-*")), default="step-0")
    assert int(newest.removeprefix("step-")) == steps
    return steps
