"""What the samples log says of each token: how much likelier the policy made it, of one group a step, and nothing where nobody knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TinyRun

from gemma_grpo.grpo.step import with_drift
from gemma_grpo.types import Completion, Prompt, RolloutGroup, ScoredGroup

SIZES = {"reward": {"length": 1.0}, "max_completion_length": 8, "max_steps": 3, "learning_rate": 0.05, "kl.step_limit": None}


@pytest.fixture(scope="module")
def run(train_tiny: Callable[..., TinyRun]) -> TinyRun:
    return train_tiny(**SIZES)


def drifting(run: TinyRun, step: int) -> list[list[dict[str, Any]]]:
    """The completions of each group of a step that has log-ratios."""
    groups = [line["completions"] for line in run.lines("samples.jsonl") if line["step"] == step]
    return [group for group in groups if any("log_ratios" in one for one in group)]


def spread(group: list[dict[str, Any]]) -> float:
    rewards = [one["reward"] for one in group]
    return float(max(rewards) - min(rewards))


def test_one_group_a_step_the_one_whose_rewards_differ_most(run: TinyRun) -> None:
    for step in (1, 2, 3):
        (group,) = drifting(run, step)
        groups = [line["completions"] for line in run.lines("samples.jsonl") if line["step"] == step]
        assert len(groups) > 1
        assert spread(group) == max(map(spread, groups))
        for one in group:
            assert len(one["tokens"]) == len(one["log_ratios"]) == one["length"]


def test_an_untrained_adapter_has_drifted_nowhere_and_a_trained_one_by_the_runs_own_kl(run: TinyRun) -> None:
    (first,) = drifting(run, 1)
    assert {ratio for one in first for ratio in one["log_ratios"]} == {0.0}
    assert any(ratio for one in drifting(run, 3)[0] for ratio in one["log_ratios"])


def test_ratios_are_the_policys_log_probability_less_the_references() -> None:
    class Spelling:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [f"<{token}>" for token in ids]

    def group(rewards: tuple[float | None, ...]) -> ScoredGroup:
        prompt = Prompt("p", "s", (), (2,), "c")
        completions = (Completion("a", (5, 6), (-1.0, -2.0), "stop"), Completion("b", (7,), (-0.5,), "length"))
        return ScoredGroup(RolloutGroup(prompt, completions, 0), rewards, {}, (0.0, 0.0))

    scored = [group((None, None)), group((0.5, 0.75)), group((0.5, None))]
    reference = torch.zeros(3, 2, 2)
    reference[1] = torch.tensor([[-1.25, -1.0], [-0.5, 0.0]])  # the second completion's second place is padding
    found = with_drift(scored, reference, Spelling())  # type: ignore[arg-type]
    assert [len(one.drifts) for one in found] == [0, 2, 0]
    assert found[1].drifts[0].tokens == ("<5>", "<6>")
    assert found[1].drifts[0].log_ratios == (0.25, -1.0)
    assert found[1].drifts[1].log_ratios == (0.0,)
    assert dataclasses.replace(found[1], drifts=()) == scored[1]


@pytest.mark.parametrize("settings", [{"kl.placement": "off"}, {"sampling.top_k": 5}], ids=str)
def test_where_the_reference_is_not_known_or_not_comparable_nothing_is_said(
    train_tiny: Callable[..., TinyRun], settings: dict[str, Any]
) -> None:
    run = train_tiny(**{**SIZES, "max_steps": 1, **settings})
    assert drifting(run, 1) == []
