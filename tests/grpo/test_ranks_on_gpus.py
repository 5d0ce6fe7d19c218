"""Several GPUs with NCCL: the run on one. Skipped, and said so, where there is but one GPU or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import assert_same, train_on

from bench.random_checkpoint import write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs two GPUs, there are {torch.cuda.device_count()}"),
]


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_gpus_train_the_1b_shape_as_one_does(tmp_path: Path, sharding: str) -> None:
    checkpoint = write_checkpoint("1b", tmp_path / "checkpoint")

    def run(world: int, **settings: Any) -> Path:
        given = {"model_name": str(checkpoint), "max_steps": 3, "precision": "fp32", "reward": {"mean_letter": 1.0}}
        return train_on(world, tmp_path / f"run-{world}", 600, **given, **settings)

    assert_same(run(2, sharding=sharding), run(1), 1e-4)
