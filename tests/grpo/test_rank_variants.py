"""Every kind of reward, loss and KL on two ranks is what it is on one: two steps of each, all of them in one pair of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import COMMON, assert_same, ended, start_ranks

TRAIN = """
import json, sys
from conftest import PAIR_ROWS, mean_letter
from gemma_grpo import GRPOTrainer

def even(completion_ids, **columns):
    return [0.5 if len(columns["prompts"][0]) % 2 else sum(ids) / 1000 for ids in completion_ids]

def sometimes(completion_ids, **columns):
    return [None if sum(ids) % 3 == 0 else "no number" if sum(ids) % 3 == 1 else float(len(ids)) for ids in completion_ids]

FUNCTIONS = {"mean_letter": mean_letter, "even": even, "sometimes": sometimes}
for settings in json.loads(sys.argv[1]):
    known = {name: FUNCTIONS[name] for name in settings["reward"] if name in FUNCTIONS}
    GRPOTrainer(dataset=PAIR_ROWS, reward_functions=known or None, **settings).train()
"""
LETTERS = {"reward": {"mean_letter": 1.0}}
VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {**LETTERS, "loss.aggregation": "grpo", "advantage.baseline": "mean", "advantage.scale": "group"},
    "dapo": {**LETTERS, "loss.aggregation": "dapo"},
    "bnpo": {**LETTERS, "loss.aggregation": "bnpo"},
    "gspo": {**LETTERS, "loss.type": "gspo"},
    "kl in the reward": {**LETTERS, "kl.placement": "reward"},
    "no kl": {**LETTERS, "kl.placement": "off"},
    "gdpo": {"reward": {"mean_letter": 1.0, "length": 0.1}, "advantage.aggregation": "gdpo"},
    "small pieces": {**LETTERS, "memory.token_budget": 60},
    "step limit": {**LETTERS, "kl.step_limit": 1e-6},
    "cut by temperature": {**LETTERS, "temperature": 0.7, "sampling.top_k": 5, "loss.tis_cap": 2.0},
    "judge": {"reward": {"judge": 1.0}},
    "pairwise": {"reward": {"pairwise": 1.0}},
    "no signal in some groups": {"reward": {"even": 1.0}},
    "skipped": {"reward": {"sometimes": 1.0}, "reward_function.on_failure": "skip", "reward_function.max_skipped": 1.0},
}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(small_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Ranks -> folder with a run for each variant."""
    found = {}
    for world in (1, 2):
        root = found[world] = tmp_path_factory.mktemp(f"world-{world}")
        common = {**COMMON, "model_name": str(small_model_dir), "max_steps": 2, "evaluation.num_prompts": 0, "witness.every": 0}
        settings = [{**common, "output_dir": str(root / name), **variant} for name, variant in VARIANTS.items()]
        ends = ended(start_ranks(TRAIN, world, arguments=[json.dumps(settings)]), 300)
        assert [code for code, _, _ in ends] == [0] * world, [err[-3000:] for _, _, err in ends]
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_are_one(runs: dict[int, Path], name: str) -> None:
    # Adam divides by the gradient's own size: where that is next to nothing, its rounding moves the weight (a step is 3e-3)
    assert_same(runs[2] / name, runs[1] / name, 1e-4)
