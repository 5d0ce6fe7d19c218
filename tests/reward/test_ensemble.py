"""Several judges as one: who scores what, and the arithmetic, worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from gemma_grpo.config.schema import RewardModelSettings
from gemma_grpo.reward.base import Scores
from gemma_grpo.reward.ensemble import (
    EnsembleReward,
    Member,
    length_slope,
    levels_of,
    members_of,
    pairs_of,
    uncertainty_weighted,
    worst_case,
)
from gemma_grpo.types import Completion, Prompt, RolloutGroup


class Fixed:
    """A judge that gives every completion of a prompt the same number, and notes what it was asked."""

    name = "fixed"

    def __init__(self, value: float) -> None:
        self.value, self.asked = value, list[str]()

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        self.asked += [group.prompt.source for group in groups]
        return [[self.value for _ in group.completions] for group in groups]


def group(source: str, *lengths: int) -> RolloutGroup:
    prompt = Prompt(f"id-{source}", source, ({"role": "user", "content": "Hi"},), (2, 9), source)
    return RolloutGroup(prompt, tuple(Completion("x", (7,) * n, (-1.0,) * n, "stop") for n in lengths), 0)


def test_uwo_and_worst_case_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0], [3.0, 0.0]])  # two members, two completions; mean 2 and 0, variance 1 and 0
    assert uncertainty_weighted(scores, 0.5).tolist() == [1.5, 0.0]
    assert uncertainty_weighted(scores, 0.0).tolist() == [2.0, 0.0]
    assert worst_case(scores, 0.5).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("combine", ["uwo", "worst"])
def test_an_ensemble_of_one_is_that_one(combine: str) -> None:
    settings = RewardModelSettings(combine=combine, uncertainty=3.0)
    assert EnsembleReward({Member("reward", 0, None): Fixed(0.7)}, settings).score([group("a", 3, 5)]) == [[pytest.approx(0.7)] * 2]


def test_each_source_is_scored_by_its_own_judges_and_an_unknown_one_by_all() -> None:
    harmless, helpful = Fixed(1.0), Fixed(3.0)
    judges = {Member("reward", 0, "harmless"): harmless, Member("reward-2", 0, "helpful"): helpful}
    reward = EnsembleReward(judges, RewardModelSettings(uncertainty=0.0))
    assert reward.score([group("helpful", 1), group("harmless", 1), group("elsewhere", 1)]) == [[3.0], [1.0], [2.0]]
    assert (harmless.asked, helpful.asked) == (["harmless", "elsewhere"], ["helpful", "elsewhere"])


def test_length_is_taken_out_source_by_source() -> None:
    reward = EnsembleReward({Member("reward", 0, None): Fixed(2.0)}, RewardModelSettings(), {"a": 0.1})
    assert reward.score([group("a", 10, 20), group("b", 10)]) == [[pytest.approx(1.0), pytest.approx(0.0)], [2.0]]


def test_the_slope_leaves_margins_that_length_does_not_explain() -> None:
    differences = [2.0, -1.0, 4.0]
    assert length_slope([0.5 * d for d in differences], differences) == pytest.approx(0.5)
    # by hand: (1 x 2 + 1 x -1) / (4 + 1) = 0.2; what is left is no longer along the differences
    assert length_slope([1.0, 1.0], [2.0, -1.0]) == pytest.approx(0.2)
    left = [1.0 - 0.2 * 2.0, 1.0 + 0.2]
    assert left[0] * 2.0 - left[1] == pytest.approx(0.0)
    assert length_slope([], []) == 0.0
    assert length_slope([1.0], [0.0]) == 0.0


def test_members_are_named_and_numbered_and_differ_by_a_part_of_the_conversations(encoded_pairs) -> None:
    settings = RewardModelSettings(members=2, per_source=True)
    named = [(one.adapter, one.source, one.number) for one in members_of(settings, ["b", "a", "b"])]
    assert named == [("reward", "a", 0), ("reward-2", "a", 1), ("reward-3", "b", 0), ("reward-4", "b", 1)]
    members = members_of(RewardModelSettings(members=3), ["a"])
    parts = [{pair.pair.pair_id for pair in pairs_of(member, encoded_pairs, 3)} for member in members]
    everything = {pair.pair.pair_id for pair in encoded_pairs}
    assert set.union(*parts) == everything
    assert all(part < everything for part in parts)
    # what one leaves out, the others have
    assert all(everything - part <= parts[(n + 1) % 3] & parts[(n + 2) % 3] for n, part in enumerate(parts))


def test_a_dpo_member_comes_after_the_judges_of_each_source_and_learns_from_all_its_pairs(encoded_pairs) -> None:
    settings = RewardModelSettings(members=2, implicit_member=True, dpo_beta=0.3)
    members = members_of(settings, ["a"])
    assert [(one.adapter, one.dpo_beta) for one in members] == [("reward", None), ("reward-2", None), ("reward-3", 0.3)]
    assert pairs_of(members[2], encoded_pairs, 2) == list(encoded_pairs)
    routed = members_of(RewardModelSettings(implicit_member=True, per_source=True), ["b", "a"])
    assert [(one.source, one.dpo_beta) for one in routed] == [("a", None), ("a", 0.1), ("b", None), ("b", 0.1)]


def test_a_dpo_member_is_compared_on_the_judges_level() -> None:
    judge, dpo = Member("reward", 0, None), Member("reward-2", 1, None, 0.1)
    # by hand: 5 - 1 and 4 - 2, so that it lies 3 above
    assert levels_of({judge: [[1.0, 2.0]], dpo: [[5.0, 4.0]]}) == {"reward-2": 3.0}
    assert levels_of({judge: [[1.0, 2.0]]}) == {}
    settings = RewardModelSettings(combine="worst")
    reward = EnsembleReward({judge: Fixed(1.0), dpo: Fixed(5.0)}, settings, levels={"reward-2": 3.0})
    assert reward.score([group("a", 1, 1)]) == [[1.0, 1.0]]  # min(1, 5 - 3)
    low = EnsembleReward({judge: Fixed(1.0), dpo: Fixed(3.5)}, settings, levels={"reward-2": 3.0})
    assert low.score([group("a", 1)]) == [[0.5]]


@pytest.fixture
def encoded_pairs(tokenizer):
    from conftest import PAIR_ROWS

    from gemma_grpo.data.hh_rlhf import load_hh_rlhf
    from gemma_grpo.data.prompts import encode_pairs

    return encode_pairs(load_hh_rlhf(PAIR_ROWS, name="a").pairs, tokenizer, 512, reserved=10).pairs
