"""Kill a process that saves checkpoints, over and over: `python -m reliability.writer_kills --kills 10000`, JSON out.

The writer saves step after step and says so after each. It is killed (SIGKILL) at a random moment; what it said must be there, whole, and
the next one goes on from it. Exit code 1 when a kill left anything else. A kill is not a power cut: tests/test_checkpoint_faults.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.machine import commit, machine, versions
from gemma_grpo.checkpoint import Checkpoint, CheckpointError, latest_checkpoint, save_checkpoint, sweep

RESULTS = Path(__file__).parent / "results"
KEEP = 2
MOST_SAVES = 3
"""Saves that a writer may finish before it is killed."""
WEIGHTS = "adapter_model.safetensors"
SIZES = (200, 3000, 40_000)
"""Numbers in the optimizer's tensors, by turns: saves of different lengths."""


def content(step: int) -> dict[str, Any]:
    """What a step saves: made of its number alone, so that a reader knows what must be there."""
    weights = torch.full((SIZES[step % len(SIZES)],), float(step))
    return {
        "adapters": {"policy": {WEIGHTS: step.to_bytes(8, "big") * 500}},
        "optimizer": {"x": weights},
        "state": {"twice": 2 * step},
    }


def is_whole(found: Checkpoint) -> bool:
    """Whether a checkpoint holds what its step saved."""
    expected = content(found.step)
    same = torch.equal(found.optimizer["x"], expected["optimizer"]["x"]) and found.state["twice"] == 2 * found.step
    return same and (found.adapter("policy") / WEIGHTS).read_bytes() == expected["adapters"]["policy"][WEIGHTS]


def write_for_ever(folder: Path, first: int, told: int) -> None:
    """The victim: tells the pipe that it begins, by the step before, and then each step that was saved."""
    step = first
    os.write(told, (first - 1).to_bytes(8, "big"))
    while True:
        save_checkpoint(folder, step, keep=KEEP, **content(step))
        os.write(told, step.to_bytes(8, "big"))
        step += 1


def _seconds_of_a_save(folder: Path) -> float:
    started = time.perf_counter()
    for step in range(6):
        save_checkpoint(folder, step, keep=KEEP, **content(step))
    return (time.perf_counter() - started) / 6


def one_kill(folder: Path, first: int, saves: int, wait: float) -> int:
    """Start a writer, kill it `wait` seconds after so many saves; the last step that it said was saved, `first` - 1 when none."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            write_for_ever(folder, first, writing)
        finally:
            os._exit(1)
    os.close(writing)
    said = b""
    while len(said) < 8 * (saves + 1):  # counted, not timed: on a busy machine it may be long before it runs at all
        part = os.read(reading, 8)
        assert part, "the writer ended by itself: it could not save"
        said += part
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself: it could not save"
    while data := os.read(reading, 65_536):
        said += data
    os.close(reading)
    return int.from_bytes(said[-8:], "big")


def problem(folder: Path, saved: int) -> tuple[str | None, int]:
    """What is wrong after a kill, None if nothing; and the step to go on from."""
    try:
        found, damaged = latest_checkpoint(folder)
    except CheckpointError as error:
        return str(error), saved
    step = found.step if found else 0
    if damaged:
        return damaged[0], step
    if step < saved:
        return f"step {saved} was saved, and the newest is {step}", step
    if found and not is_whole(found):
        return f"step {step} holds something else than it saved", step
    return None, step


def run(kills: int, seed: int) -> dict[str, Any]:
    """So many kills of one run of saves."""
    generator, problems, leftovers = random.Random(seed), [], 0
    started, step = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoints"
        one_save = _seconds_of_a_save(Path(temporary) / "timed")
        for kill in range(kills):
            saved = one_kill(folder, step + 1, generator.randint(0, MOST_SAVES), generator.uniform(0, one_save))
            leftovers += any(path.name.startswith(".") for path in folder.iterdir()) if folder.is_dir() else 0
            if kill % 2:  # the next writer has to manage without
                sweep(folder)
            found, step = problem(folder, saved)
            if found:
                problems.append({"kill": kill, "problem": found})
    return {
        "kills": kills,
        "seed": seed,
        "bad_states": len(problems),
        "problems": problems[:20],
        "killed_in_the_middle_of_a_save": leftovers,
        "steps_saved": step,
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Kill, write the result, and say it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "writer_kills.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = {"machine": machine(), "commit": commit(), "versions": versions(), **run(options.kills, options.seed)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{report['kills']} kills, {report['killed_in_the_middle_of_a_save']} in the middle of a save: {report['bad_states']} bad states")
    if report["bad_states"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
