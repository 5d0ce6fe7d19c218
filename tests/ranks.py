"""Several processes as the ranks of one run, without a launcher: each is told its number and where the first one listens.

And what it means that a run on some ranks is the run on others.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

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


COMMON: dict[str, Any] = {
    **{"batch_size": 2, "gradient_accumulation_steps": 2, "num_generations": 3, "learning_rate": 3e-3, "max_completion_length": 10},
    **{"gradient_checkpointing": False, "data.holdout": 0.25, "judge.least_accuracy": 0.0, "watchdog.factor": None},
    **{"epochs": 3.0, "optimizer.schedule": "constant"},  # so that a run that is told to end earlier begins as a longer one does
    **{"witness.look_alikes": 2, "witness.num_prompts": 3, "witness.every": 3, "evaluation.num_prompts": 3, "advantage.no_signal_steps": 0},
}
"""Of a small run with looks and an evaluation, whose steps have four prompts."""


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


def assert_close(one: Any, other: Any, tolerance: float, where: str = "") -> None:
    """The same but for rounding: numbers to a tolerance, all else exactly."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_close(one[key], other[key], tolerance, f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_close(*pair, tolerance, f"{where}/{index}")
    elif isinstance(one, float) and isinstance(other, float):
        assert abs(one - other) <= tolerance * max(1.0, abs(one)), (where, one, other)
    else:
        assert one == other, where


def assert_same(run: Path, expected: Path, tolerance: float = 1e-6) -> None:
    """Samples and rewards, metrics, looks, evaluation, adapter."""
    looked = ["witnesses.jsonl"] if (expected / "witnesses.jsonl").is_file() else []
    for name in ("samples.jsonl", *looked, "metrics.jsonl"):
        loose = 1e-5 if name != "samples.jsonl" else 2e-3  # log-ratios are rounded to three digits
        assert_close(lines(run, name), lines(expected, name), loose, name)
    # Adam does not see how large a gradient is: a wrong denominator would show here alone
    norms = [[line["grad_norm"] for line in lines(path, "metrics.jsonl")] for path in (run, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for one, other in zip(lines(run, "samples.jsonl"), lines(expected, "samples.jsonl"), strict=True):
        texts = [[completion["text"] for completion in line["completions"]] for line in (one, other)]
        assert texts[0] == texts[1]
    adapters = [load_file(path / "adapter" / "adapter_model.safetensors") for path in (run, expected)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, value in adapters[0].items():
        torch.testing.assert_close(value, adapters[1][name], rtol=0, atol=tolerance)


TRAIN = """
import json, sys
from conftest import PAIR_ROWS, mean_letter
from gemma_grpo import GRPOTrainer
settings = json.loads(sys.argv[1])
resume, force = (settings.pop(name, False) for name in ("resume", "force"))
rewards = {"mean_letter": mean_letter} if settings.get("reward") else None
trainer = GRPOTrainer(dataset=PAIR_ROWS, reward_functions=rewards, **settings)
trainer.train(resume_from_checkpoint=resume, force=force)
"""


def train_on(world: int, path: Path, timeout: float = 300.0, **settings: Any) -> Path:
    """Train a run in the folder `path` on so many ranks; `resume` and `force` as train() takes them."""
    found = ended(start_ranks(TRAIN, world, arguments=[json.dumps({**COMMON, "output_dir": str(path), **settings})]), timeout)
    assert [code for code, _, _ in found] == [0] * world, [err[-3000:] for _, _, err in found]
    assert not [out for _, out, _ in found[1:] if out]  # rank 0 alone speaks
    return path
