"""What the page costs a training beside it, and how it holds up: `python -m reliability.page_load`, JSON out.

A training on the miniature goes on while 64 pages hold their streams open and 50 requests a second ask for everything a page asks for.
Quiet, load and attack take turns; in an attack IDLE connections say nothing, SLOW ones send a byte a second, and heads of ten megabytes
come one after the other. Counted are the seconds of a step in each, the answers' times under load, and the memory of the server's
process. Clients are in this process, on the same machine: what they take of it counts against the page.
Exit code 1 when the 99th percentile is above SLOWEST, a step is slowed by more than SLOWED, memory grows by more than GROWTH, or any
answer is an error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.machine import commit, machine, versions
from reliability.writer_kills import RESULTS

SLOWEST, SLOWED, GROWTH = 0.250, 0.05, 0.10
STREAMS, RATE = 64, 50
IDLE, SLOW = 1000, 32
WARM_UP = 30
"""Seconds of load before anything counts: libraries are loaded and charts drawn, as of a page that is open."""
TOKEN = "0123456789abcdef0123"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
PATHS = (
    *("/", "/static/page.js", "/static/page.css", "/api/runs", "/api/runs/run", "/api/runs/run/progress", "/api/runs/run/groups"),
    *("/api/runs/run/groups?step=2", "/api/runs/run/samples?filter=zero%20variance", "/api/runs/run/changed?order=best"),
    *("/api/panels?run=run", "/api/chart?run=run&key=reward", "/api/chart?run=run&key=kl", "/api/chart?run=run&key=loss"),
)


class Load:
    """Clients of the page at one port."""

    def __init__(self, port: int) -> None:
        self.port, self.seconds, self.wrong, self.events = port, list[float](), list[str](), 0

    def _head(self, path: str) -> bytes:
        close = "" if path.endswith("/events") else "Connection: close\r\n"
        return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nCookie: gemma-grpo-{self.port}={TOKEN}\r\n{close}\r\n".encode()

    async def ask(self, path: str) -> None:
        """One request, and how long its answer took."""
        began = time.perf_counter()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(self._head(path))
            answer = await asyncio.wait_for(reader.read(), 30)
            writer.close()
        except (OSError, asyncio.TimeoutError) as error:
            self.wrong.append(f"{path}: {error!r}")
            return
        self.seconds.append(time.perf_counter() - began)
        if not answer.startswith(b"HTTP/1.1 200"):
            self.wrong.append(f"{path}: {answer[:40]!r}")

    async def listen(self) -> None:
        """One stream of events, held open."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(self._head("/api/runs/run/events"))
            while line := await reader.readline():
                self.events += line.startswith(b"event: progress")
            self.wrong.append("a stream ended")
        finally:
            writer.close()

    async def press(self, seconds: float) -> None:
        """All clients at once, for so long."""
        streams = [asyncio.create_task(self.listen()) for _ in range(STREAMS)]
        asked: list[asyncio.Task[None]] = []
        began = time.perf_counter()
        while (since := time.perf_counter() - began) < seconds:
            while len(asked) < since * RATE:
                asked.append(asyncio.create_task(self.ask(PATHS[len(asked) % len(PATHS)])))
            await asyncio.sleep(0.005)
        await asyncio.gather(*asked)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)

    async def attack(self, seconds: float) -> None:
        """All that a client should not do, for so long."""
        clients = [self._hold(every=None) for _ in range(IDLE)] + [self._hold(every=1.0) for _ in range(SLOW)] + [self._flood()]
        tasks = [asyncio.create_task(client) for client in clients]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _hold(self, every: float | None) -> None:
        """Connections one after the other, each as long as the server has it; with a byte now and then, or none."""
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                try:
                    while every is not None and not reader.at_eof():
                        writer.write(b"G")
                        await asyncio.sleep(every)
                    await reader.read()
                finally:
                    writer.close()
            await asyncio.sleep(10)

    async def _flood(self) -> None:
        """Heads of ten megabytes."""
        while True:
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                try:
                    writer.write(b"GET / HTTP/1.1\r\nX: ")
                    for _ in range(160):
                        writer.write(b"a" * 65536)
                        await writer.drain()
                finally:
                    writer.close()
            await asyncio.sleep(1)


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def step_seconds(run: Path, spans: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds of each step that lies within one of the spans of time, whole."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [(event["time"], sum(event["seconds"].values())) for event in events if event["kind"] == "step_time"]
    return [seconds for end, seconds in steps if any(start <= end - seconds and end <= stop for start, stop in spans)]


def start(root: Path) -> tuple[subprocess.Popen[str], subprocess.Popen[bytes], int]:
    """The page's server and the training, and the port."""
    token = root / "token"
    token.write_text(TOKEN, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ["max_steps=100000", "epochs=10000", "save_steps=0", "witness.every=0", "reward={length: 1.0}", "kl.hard_stop_steps=0"]
    words = ["train", "miniature", *settings, f"output_dir={root / 'runs' / 'run'}"]
    train = subprocess.Popen([sys.executable, "-m", "gemma_grpo.cli", *words], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    (root / "runs").mkdir(exist_ok=True)
    words = ["watch", str(root / "runs"), "--port", str(port), "--token-file", str(token)]
    page = subprocess.Popen([sys.executable, "-m", "gemma_grpo.cli", *words], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert page.stdout is not None
    page.stdout.readline()
    metrics = root / "runs" / "run" / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 3:
        if train.poll() is not None:
            raise RuntimeError("the training ended")
        time.sleep(0.5)
    return page, train, port


def measure(root: Path, seconds: float, turns: int) -> dict[str, Any]:
    """Quiet, load and attack in turn."""
    page, train, port = start(root)
    load = Load(port)
    spans: dict[str, list[tuple[float, float]]] = {"quiet": [], "loaded": [], "attacked": []}
    memory: dict[str, list[int]] = {"loaded": [], "attacked": []}
    turn = seconds / turns
    doing = {"quiet": lambda: asyncio.sleep(turn), "loaded": lambda: load.press(turn), "attacked": lambda: load.attack(turn)}
    try:
        asyncio.run(load.press(WARM_UP))
        load.seconds.clear()
        for _ in range(turns):
            for name, do in doing.items():
                began = time.time()
                asyncio.run(do())
                spans[name].append((began, time.time()))
                if name in memory:
                    memory[name].append(resident(page.pid))
    finally:
        train.send_signal(signal.SIGTERM)
        page.terminate()
        train.wait(60)
        page.wait(60)
    return report(load, {name: step_seconds(root / "runs" / "run", span) for name, span in spans.items()}, memory)


def report(load: Load, steps: Mapping[str, Sequence[float]], memory: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The figures, and whether they hold."""
    cuts, medians = statistics.quantiles(load.seconds, n=100), {name: statistics.median(seconds) for name, seconds in steps.items()}
    slowed = {name: medians[name] / medians["quiet"] - 1 for name in ("loaded", "attacked")}
    growth = {name: found[-1] / found[0] - 1 for name, found in memory.items()}
    p99 = cuts[98]
    return {
        "requests": len(load.seconds),
        "events": load.events,
        "errors": len(load.wrong),
        "first_errors": load.wrong[:5],
        "answer_seconds": {"median": statistics.median(load.seconds), "p99": p99, "max": max(load.seconds)},
        "step_seconds": medians,
        "steps": {name: len(seconds) for name, seconds in steps.items()},
        "slowed_by": slowed,
        "memory_bytes": memory,
        "memory_growth": growth,
        "holds": p99 < SLOWEST and max(slowed.values()) <= SLOWED and max(growth.values()) <= GROWTH and not load.wrong,
    }


def main() -> None:
    """Measure, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="of load; there is as much of quiet and of attack")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / "page_load.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        found: Mapping[str, Any] = measure(Path(root), options.seconds, options.turns)
    head = {"machine": machine(), "versions": versions(), "commit": commit(), "seconds": options.seconds}
    options.out.write_text(json.dumps({**head, **found}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    sys.exit(0 if found["holds"] else 1)


if __name__ == "__main__":
    main()
