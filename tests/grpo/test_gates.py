"""A judge that cannot tell good from bad is a metric, not a reward."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from conftest import PAIR_ROWS

from gemma_grpo.data.hh_rlhf import load_hh_rlhf
from gemma_grpo.data.prompts import encode_pairs
from gemma_grpo.grpo.gates import PAIRS_OF_A_SOURCE, failing, gate_report, gate_warning
from gemma_grpo.reward.base import Scores
from gemma_grpo.reward.pairwise import PairwiseJudge
from gemma_grpo.types import RolloutGroup


class Pointwise:
    """Right on the pairs of one source, wrong on others'."""

    name = "judge"

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        return [[1.0, 0.0] if group.prompt.source == "known" else [0.0, 1.0] for group in groups]


class FirstPlace(PairwiseJudge):
    """Always for the reply shown first."""

    def __init__(self) -> None:
        pass

    def preferences(self, groups: Sequence[RolloutGroup]) -> list[float]:
        return [0.51 for _ in groups]

    def consistent(self, groups: Sequence[RolloutGroup]) -> list[bool]:
        return [False for _ in groups]


@pytest.fixture
def pairs(tokenizer):
    found = []
    for source in ("known", "other"):
        found += encode_pairs(load_hh_rlhf(PAIR_ROWS, name=source).pairs, tokenizer, 512, reserved=10).pairs
    return found


def test_every_source_is_asked_on_its_own(pairs) -> None:
    report = gate_report(Pointwise(), pairs)  # type: ignore[arg-type]
    assert (report["known"]["value"], report["other"]["value"]) == (1.0, 0.0)
    assert report["known"]["n"] == len(PAIR_ROWS) < PAIRS_OF_A_SOURCE
    assert failing(report, 0.6) == ["other"]
    assert "right on 0% on other of the held-out pairs" in gate_warning("judge", report, 0.6)


def test_a_liking_for_the_first_place_is_no_opinion(pairs) -> None:
    report = gate_report(FirstPlace(), pairs)
    assert report["known"]["value"] == 0.0


def test_a_judge_that_fails_is_logged_and_counts_for_nothing(train_tiny) -> None:
    settings = {"reward": {"judge": 1.0, "length": 0.5}, "reward_model.shaping": "none"}
    gated = train_tiny(**settings, **{"judge.least_accuracy": 1.0})
    warned = [event["text"] for event in gated.lines("events.jsonl") if event["kind"] == "warn"]
    assert any("is logged and counts for nothing" in text for text in warned)
    assert set(gated.json("run.json")["gates"]) == {"judge"}
    for line in gated.lines("samples.jsonl"):
        for completion in line["completions"]:
            assert completion["parts"]["judge"] is not None
            assert completion["reward"] == pytest.approx(0.5 * completion["parts"]["length"])


def test_without_a_reward_that_is_left_nothing_is_trained(tiny_trainer) -> None:
    with pytest.raises(ValueError, match="no reward is left to train with: judge, pairwise cannot be trusted"):
        tiny_trainer(reward={"judge": 1.0, "pairwise": 1.0}, **{"judge.least_accuracy": 1.0}).train()


def test_a_resumed_run_keeps_the_gates_it_began_with(train_tiny, tmp_path) -> None:
    settings = {"reward": {"judge": 1.0, "length": 0.5}, "judge.least_accuracy": 0.9, "optimizer.schedule": "constant"}
    folder = {"output_dir": str(tmp_path / "run")}
    whole = train_tiny(**settings)
    train_tiny(**settings, **folder, max_steps=1)
    assert train_tiny(**settings, **folder, resume=True).text("samples.jsonl") == whole.text("samples.jsonl")
