"""Two hosts on one machine: `python -m reliability.two_hosts` (as root, with iproute2), JSON out.

Each host is a network namespace with an address of its own, and runs torchrun with one rank; a cable (a veth pair) is between them. One
run is not disturbed; in the other the cable is pulled for longer than ranks.timeout_seconds once steps were made, and plugged in again.
Both ranks must end alike, start again by themselves, and finish with logs and adapter as the first run's, byte for byte.
Exit code 1 where they do not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.machine import commit, machine, versions
from reliability.rank_kills import ENVIRONMENT, SETTINGS, contents
from reliability.trainer_kills import rows
from reliability.writer_kills import RESULTS

HOSTS = (("gg-a", "gg-va", "10.99.0.1"), ("gg-b", "gg-vb", "10.99.0.2"))
"""Name, its end of the cable, address."""
TIMEOUT, PULLED = 6.0, 11.0
"""Seconds: of a rank that does not answer, and without a cable. torchrun's own patience with a host is 15."""


def ip(*words: str) -> None:
    """One call of iproute2."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def cable() -> Iterator[None]:
    """Two hosts with a cable between them, taken down in the end."""
    for name, _, _ in HOSTS:
        ip("netns", "add", name)
    try:
        ip("link", "add", HOSTS[0][1], "type", "veth", "peer", "name", HOSTS[1][1])
        for name, end, address in HOSTS:
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            plug(name, end, "up")
            plug(name, "lo", "up")
        yield
    finally:
        for name, _, _ in HOSTS:
            ip("netns", "del", name)


def plug(host: str, end: str, state: str) -> None:
    """Pull ("down") or plug in ("up")."""
    ip("-n", host, "link", "set", end, state)


def start(folder: Path, data: Path) -> list[subprocess.Popen[bytes]]:
    """A run on both hosts, whose disk is the same."""
    settings = [one for one in SETTINGS if not one.startswith(("gpus", "ranks."))]
    common = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint={HOSTS[0][2]}:29500"]
    found = []
    for name, end, address in HOSTS:
        # namespaces share the machine's name, by which torchrun would else know who is to hold the store
        own = [f"--rdzv-conf=is_host={address == HOSTS[0][2]}", f"--rdzv-id={folder.name}", f"--local-addr={address}"]
        words = [sys.executable, "-m", "torch.distributed.run", *common, *own, "-m", "gemma_grpo", "train", *settings]
        words += [f"ranks.timeout_seconds={TIMEOUT:g}", f"dataset={data}", f"output_dir={folder}"]
        with folder.with_suffix(f".{name}.log").open("wb") as log:
            env = {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": end}
            found.append(subprocess.Popen(["ip", "netns", "exec", name, *words], env=env, stdout=log, stderr=log))
    return found


def steps(folder: Path) -> int:
    """Steps in a run's log."""
    log = folder / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def finished(hosts: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """The exit codes; whoever hangs is ended."""
    try:
        return [host.wait(400) for host in hosts]
    finally:
        for host in hosts:
            host.kill()


def measure(root: Path) -> dict[str, Any]:
    """The undisturbed run and the one with a pulled cable."""
    data = root / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    with cable():
        whole = finished(start(root / "whole", data))
        hosts = start(root / "pulled", data)
        while steps(root / "pulled") < 5 and all(host.poll() is None for host in hosts):
            time.sleep(0.05)
        plug(*HOSTS[1][:2], "down")
        before = steps(root / "pulled")
        time.sleep(PULLED)
        while_pulled = steps(root / "pulled") - before
        plug(*HOSTS[1][:2], "up")
        codes = finished(hosts)
    same = contents(root / "pulled") == contents(root / "whole")
    logs = {name: (root / f"pulled.{name}.log").read_text(errors="replace") for name, _, _ in HOSTS}
    told = [line for text in logs.values() for line in text.splitlines() if line.startswith("error:")]
    found = {"codes": [whole, codes], "steps_before": before, "steps_without_cable": while_pulled, "same": same, "told": sorted(set(told))}
    if any(codes) or any(whole) or not same:
        print("\n".join(text[-3000:] for text in logs.values()))
    return {**found, "resumed": sum("note: resumed" in text for text in logs.values()), "holds": same and not any([*whole, *codes])}


def main() -> None:
    """Measure, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "two_hosts.json")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("this makes network namespaces: run it as root.")
    with tempfile.TemporaryDirectory() as root:
        found = measure(Path(root))
    head = {"machine": machine(), "versions": versions(), "commit": commit(), "timeout_seconds": TIMEOUT, "pulled_seconds": PULLED}
    options.out.write_text(json.dumps({**head, **found}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    sys.exit(0 if found["holds"] else 1)


if __name__ == "__main__":
    main()
