"""How the driver talks to a worker: one JSON object a line, on the worker's stdin and what was its stdout.

Also what both workers measure in the same way: peak memory above what was held after loading.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

MIB = 2**20


class Line:
    """A worker's end. Whatever libraries print goes to stderr: stdout belongs to the driver."""

    def __init__(self) -> None:
        self._out: IO[str] = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def receive(self) -> dict[str, Any]:
        """The next order; {"do": "quit"} when the driver is gone."""
        text = sys.stdin.readline()
        return dict(json.loads(text)) if text else {"do": "quit"}

    def send(self, answer: dict[str, Any]) -> None:
        """One answer."""
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()


class Worker:
    """A worker process as the driver sees it."""

    def __init__(self, python: str, module: str, log: Path) -> None:
        self.module, self.log_path = module, log
        self._log = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [python, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Send an order and wait for its answer. Raises RuntimeError with the end of the worker's log when it died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._log.flush()
            end = self.log_path.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise RuntimeError(f"{self.module} ended while it was asked to {do}:\n{end}")
        return dict(json.loads(answer))

    def close(self) -> None:
        """End the process; a worker that does not go by itself is killed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()


class PeakMemory:
    """Peak memory of a step above what the process held once the model was loaded, in bytes.

    On a CPU: the resident set's high-water mark (VmHWM of /proc/self/status, reset by writing 5 to /proc/self/clear_refs); what an
    allocator keeps of an earlier step counts, on both sides. On CUDA: bytes allocated in tensors, as torch counts them.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        gc.collect()
        self.base = self._now()

    def reset(self) -> None:
        """Start of a step."""
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def above_base(self) -> int:
        """Highest since `reset`, above the base."""
        if self._cuda:
            import torch

            return torch.cuda.max_memory_allocated() - self.base
        return _status("VmHWM") - self.base

    def _now(self) -> int:
        if self._cuda:
            import torch

            return torch.cuda.memory_allocated()
        return _status("VmRSS")


def _status(name: str) -> int:
    lines: Sequence[str] = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
