"""A run on several ranks is the run on one: the same completions, rewards and adapters, resumed on any number of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyRun
from ranks import COMMON, assert_same, ended, lines, start_ranks, train_on
from safetensors.torch import load_file

REWARD = {"mean_letter": 1.0, "length": 0.1}
SHORT = {"reward": REWARD, "witness.every": 0, "evaluation.num_prompts": 0}
JUDGED = {"reward_model.batch_size": 4, "reward_model.max_pairs": 12, "witness.share": 0.3, "max_steps": 4}


Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(small_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    root, count = tmp_path_factory.mktemp("runs"), itertools.count()

    def run(world: int, path: Path | None = None, **settings: Any) -> Path:
        path = path or root / f"run-{next(count)}"
        return train_on(world, path, model_name=str(small_model_dir), **settings)

    return run


@pytest.fixture(scope="module")
def alone(train: Train) -> Path:
    """Ten steps, twenty updates, on one rank."""
    run = train(1, reward=REWARD, max_steps=10, save_steps=4)
    assert sum(line["passes"] for line in lines(run, "metrics.jsonl")) == 20
    return run


@pytest.fixture(scope="module")
def short(train: Train) -> Path:
    return train(1, **SHORT, max_steps=4)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_twenty_updates_are_the_same_on_any_number_of_ranks(train: Train, alone: Path, world: int) -> None:
    assert_same(train(world, reward=REWARD, max_steps=10, save_steps=4), alone)


@pytest.fixture(scope="module")
def judged(train: Train) -> Path:
    return train(1, **JUDGED)


@pytest.mark.slow
def test_a_trained_judge_and_its_witness_are_the_same_on_two_ranks(train: Train, judged: Path) -> None:
    run = train(2, **JUDGED)
    assert_same(run, judged, 1e-5)  # rewards of a judge that was itself trained on two ranks
    for name in ("reward", "witness"):
        one, other = (load_file(path / name / "adapter_model.safetensors") for path in (run, judged))
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("first", "then"), [pytest.param(*pair, marks=pytest.mark.slow) for pair in ((2, 1), (1, 2), (2, 4), (4, 2), (1, 4), (4, 1))]
)
def test_a_run_goes_on_with_any_number_of_ranks(train: Train, short: Path, first: int, then: int) -> None:
    path = train(first, **SHORT, max_steps=2)
    assert len(lines(path, "metrics.jsonl")) == 2
    train(then, path, **SHORT, max_steps=4, resume=True)
    assert_same(path, short)


DIVERGING = """
import json, sys
from conftest import PAIR_ROWS, mean_letter
from gemma_grpo import GRPOTrainer, distributed
trainer = GRPOTrainer(dataset=PAIR_ROWS, reward_functions={"mean_letter": mean_letter}, **json.loads(sys.argv[1]))
step = trainer._step_or_save
def broken():
    if trainer.step == 1 and distributed.rank() == 1:
        weight = next(iter(trainer.model.adapter_parameters("policy").values()))
        weight.data.view(-1)[0] += 1e-6
    return step()
trainer._step_or_save = broken
trainer.train()
"""


@pytest.mark.slow
def test_a_rank_whose_weights_are_other_than_the_first_ones_ends_the_run(small_model_dir: Path, tmp_path: Path) -> None:
    settings = {**COMMON, "model_name": str(small_model_dir), "output_dir": str(tmp_path / "run"), "reward": {"mean_letter": 1.0}}
    found = ended(start_ranks(DIVERGING, 2, arguments=[json.dumps({**settings, "max_steps": 3})]), 120)
    assert [code for code, _, _ in found] == [1, 1]
    assert all("rank 1 has another policy after an update than rank 0" in err for _, _, err in found)
    assert [line["step"] for line in lines(tmp_path / "run", "metrics.jsonl")] == [1]
    idle = [line["idle"] for line in lines(tmp_path / "run", "events.jsonl") if line["kind"] == "ranks"]
    assert len(idle) == 1
    assert all(0 <= share < 1 for share in idle[0])


def test_a_script_that_nobody_launched_is_told_so(train_tiny: Callable[..., TinyRun], capsys: pytest.CaptureFixture[str]) -> None:
    train_tiny(gpus=2, max_steps=1)
    assert "gpus is 2, and this process works alone: start the script by torchrun --nproc-per-node 2" in capsys.readouterr().out
