"""Several processes as the ranks of one run, without a launcher: each is told its number and where the first one listens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def start_ranks(code: str, world: int, *, arguments: Sequence[str] = (), cwd: Path | None = None) -> list[subprocess.Popen[str]]:
    """Each runs `code`, which may import what tests can."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env={**common, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
        )
        for number in range(world)
    ]


def ended(ranks: Sequence[subprocess.Popen[str]], timeout: float = 120.0) -> list[tuple[int, str, str]]:
    """Exit code, output and error output of each, once all have ended; a rank that hangs fails the test."""
    found = []
    try:
        for one in ranks:
            out, err = one.communicate(timeout=timeout)
            found.append((one.returncode, out, err))
    finally:
        for one in ranks:
            one.kill()
    return found
