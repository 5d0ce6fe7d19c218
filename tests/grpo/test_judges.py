"""A DPO adapter among the judges of a run: trained, scored by its likelihoods, levelled, and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import PAIR_ROWS

from gemma_grpo import GRPOTrainer
from gemma_grpo.grpo.assess import reference_samples
from gemma_grpo.reward.generative import GenerativeReward
from gemma_grpo.reward.implicit import ImplicitReward

SETTINGS = {
    **{"reward": {"generative": 1.0}, "reward_model.implicit_member": True, "reward_model.dpo_beta": 0.5},
    **{"reward_model.learning_rate": 2e-2, "reward_model.combine": "worst"},
}


def test_a_dpo_member_scores_by_its_likelihoods_on_the_judges_level_and_survives_the_disk(train_tiny: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in PAIR_ROWS), encoding="utf-8")
    run = train_tiny(**SETTINGS, dataset=str(rows))
    trainer = run.trainer
    groups = reference_samples(trainer.engine, trainer.data, trainer.config)
    judge, dpo = (GenerativeReward(trainer.model, "reward").score(groups), ImplicitReward(trainer.model, "reward-2", 0.5).score(groups))
    level = run.json("reward/calibration.json")["levels"]["reward-2"]
    gaps = [b - a for one, other in zip(judge, dpo, strict=True) for a, b in zip(one, other, strict=True)]
    assert level == pytest.approx(sum(gaps) / len(gaps), abs=1e-4)
    assert max(map(abs, (value for row in dpo for value in row))) > 1e-3  # it was trained
    expected = [[min(a, b - level) for a, b in zip(one, other, strict=True)] for one, other in zip(judge, dpo, strict=True)]
    scores = trainer.judges.reward().score(groups)
    assert scores == [pytest.approx(row, abs=1e-4) for row in expected]
    assert any(a != b for one, other in zip(scores, judge, strict=True) for a, b in zip(one, other, strict=True))
    assert GRPOTrainer.from_run(run.path).judges.reward().score(groups) == [pytest.approx(row, abs=1e-5) for row in scores]
