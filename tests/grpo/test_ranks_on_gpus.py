"""Several GPUs with NCCL: the run on one. Skipped, and said so, where there is but one GPU or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import COMMON, assert_same, ended, start_ranks

from bench.random_checkpoint import write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs two GPUs, there are {torch.cuda.device_count()}"),
]
TRAIN = """
import json, sys
from conftest import PAIR_ROWS, mean_letter
from gemma_grpo import GRPOTrainer
GRPOTrainer(dataset=PAIR_ROWS, reward_functions={"mean_letter": mean_letter}, **json.loads(sys.argv[1])).train()
"""


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_gpus_train_the_1b_shape_as_one_does(tmp_path: Path, sharding: str) -> None:
    checkpoint = write_checkpoint("1b", tmp_path / "checkpoint")

    def run(world: int, **settings: Any) -> Path:
        path = tmp_path / f"run-{world}"
        given = {**COMMON, "model_name": str(checkpoint), "output_dir": str(path), "max_steps": 3, "precision": "fp32", **settings}
        found = ended(start_ranks(TRAIN, world, arguments=[json.dumps({**given, "reward": {"mean_letter": 1.0}})]), 600)
        assert [code for code, _, _ in found] == [0] * world, [err[-3000:] for _, _, err in found]
        return path

    assert_same(run(2, sharding=sharding), run(1), 1e-4)
