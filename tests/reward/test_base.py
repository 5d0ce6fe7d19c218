from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import pytest
import torch

from gemma_grpo.reward.base import RewardError, RewardStack, Skipped, WeightedReward, check_flat, unknown_reward, validate_scores
from gemma_grpo.types import Completion, Prompt, RolloutGroup


@dataclass
class Fixed:
    """A reward that returns what it was given."""

    name: str
    scores: object

    def score(self, groups):
        return self.scores


def groups(*sizes: int) -> list[RolloutGroup]:
    prompt = Prompt("id", "test", ({"role": "user", "content": "x"},), (2,), "c")
    return [RolloutGroup(prompt, tuple(Completion("y", (106,), (0.0,), "stop") for _ in range(size)), 0) for size in sizes]


def test_the_reward_is_the_weighted_sum_of_its_parts():
    stack = RewardStack([WeightedReward(Fixed("a", [[1, 2], [3, 4]]), 2.0), WeightedReward(Fixed("b", [[10, 0], [0, -10]]), 0.5)])
    scores = stack.score(groups(2, 2))
    assert scores.rewards == [[7.0, 4.0], [6.0, 3.0]]
    assert scores.parts == {"a": [[1.0, 2.0], [3.0, 4.0]], "b": [[10.0, 0.0], [0.0, -10.0]]}


def test_a_part_that_does_not_score_is_left_out_of_the_sum():
    stack = RewardStack([WeightedReward(Fixed("a", [[None, 2, None]])), WeightedReward(Fixed("b", [[10, None, None]]), 0.5)])
    assert stack.score(groups(3)).rewards == [[5.0, 2.0, None]]


def test_a_part_of_weight_zero_is_measured_and_changes_nothing_but_what_nobody_else_scores():
    stack = RewardStack([WeightedReward(Fixed("a", [[1, None]])), WeightedReward(Fixed("witness", [[5, 5]]), 0.0)])
    scores = stack.score(groups(2))
    assert scores.rewards == [[1.0, 0.0]]
    assert scores.parts["witness"] == [[5.0, 5.0]]


def test_shaping_comes_before_weighting_and_leaves_the_raw_parts_alone():
    seen = []

    def halved(values, of_groups):
        seen.append((values, len(of_groups)))
        return [[None if value is None else value / 2 for value in row] for row in values]

    scores = RewardStack([WeightedReward(Fixed("a", [[4, None]]), 3.0, halved)]).score(groups(2))
    assert scores.rewards == [[6.0, None]]
    assert scores.parts == {"a": [[4.0, None]]}
    assert seen == [([[4.0, None]], 1)]


def test_a_shape_that_breaks_the_scores_is_named():
    stack = RewardStack([WeightedReward(Fixed("a", [[4]]), 1.0, lambda values, of_groups: [[math.nan]])])
    with pytest.raises(RewardError, match=r"'a \(shaped\)' returned nan at group 0, completion 0"):
        stack.score(groups(1))


def test_groups_of_different_size_and_no_groups_are_fine():
    assert RewardStack([WeightedReward(Fixed("a", [[1], [2, 3]]))]).score(groups(1, 2)).rewards == [[1.0], [2.0, 3.0]]
    assert RewardStack([WeightedReward(Fixed("a", []))]).score([]).rewards == []


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "no parts"),
        ([WeightedReward(Fixed("a", [])), WeightedReward(Fixed("a", []))], "two rewards are named 'a'"),
        ([WeightedReward(Fixed("a", []), math.nan)], "weight of reward 'a' is nan"),
        ([WeightedReward(Fixed("a", []), math.inf)], "weight of reward 'a' is inf"),
    ],
)
def test_a_stack_that_cannot_work_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        RewardStack(parts)


@pytest.mark.parametrize(
    "scores",
    [
        [[1, 2.0], [None, 4]],
        ((1, 2), (None, 4)),
        [[np.float32(1), np.int64(2)], [None, torch.tensor(4)]],
        [np.array([1, 2]), [None, torch.tensor(4.0, requires_grad=True)]],
        [torch.tensor([1.0, 2.0]), [None, np.array(4)]],
    ],
)
def test_numbers_of_every_library_become_floats(scores):
    checked = validate_scores(scores, groups(2, 2), "mine")
    assert checked == [[1.0, 2.0], [None, 4.0]]
    assert all(type(value) in (float, type(None)) for row in checked for value in row)


def test_whole_arrays_are_lists_of_lists():
    assert validate_scores(torch.arange(4.0).reshape(2, 2), groups(2, 2), "mine") == [[0.0, 1.0], [2.0, 3.0]]
    assert check_flat(np.array([1, 2]), groups(1, 1)) == ([1.0, 2.0], [])


@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (10**400, "inf"),
        (True, r"True \(bool\)"),
        (np.bool_(True), "bool"),
        (torch.tensor(True), r"tensor\(True\) \(Tensor\)"),
        ("1.0", r"'1.0' \(str\)"),
        (1j, r"1j \(complex\)"),
        (np.complex64(1), "complex64"),
        (torch.tensor(1j), "Tensor"),
        (torch.tensor([1.0]), "Tensor"),
        (Decimal("1"), "Decimal"),
        ([1.0], r"\[1.0\] \(list\)"),
        (float, "type"),
    ],
)
def test_what_is_no_finite_number_is_named_with_reward_index_and_value(bad, shown):
    with pytest.raises(RewardError, match=rf"reward 'mine' returned .*{shown}.* at group 1, completion 0"):
        validate_scores([[1.0, 2.0], [bad, 0.0]], groups(2, 2), "mine")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[1.0]], "returned 1 groups of scores for 2 groups"),
        ([[1.0, 2.0], [1.0]], "returned 1 scores for the 2 completions of group 1"),
        ([1.0, 2.0], r"returned 1.0 \(float\)"),
        (None, r"returned None \(NoneType\)"),
        ({0: [1.0]}, "dict"),
        ("ab", "str"),
        (torch.tensor(1.0), "Tensor"),
        (iter([[1.0]]), "list_iterator"),
    ],
)
def test_a_wrong_count_or_container_is_named(scores, message):
    with pytest.raises(RewardError, match=f"reward 'mine' .*{message}"):
        validate_scores(scores, groups(2, 2), "mine")


def test_a_value_that_cannot_be_shown_does_not_hide_the_error():
    class Shy:
        def __repr__(self):
            raise RuntimeError("no")

    with pytest.raises(RewardError, match=r"returned unprintable: RuntimeError \(Shy\) at group 0, completion 0"):
        validate_scores([[Shy()]], groups(1), "mine")


# float32's largest number is 2^128 - 2^104; halfway to 2^128, the next there would be, rounding goes to infinity
@pytest.mark.parametrize(("value", "finite"), [(2.0**128 - 2.0**104, True), (2.0**128 - 2.0**103, False), (1e39, False), (-1e39, False)])
def test_a_score_must_be_finite_in_float32_which_is_what_it_is_learned_from_in(value, finite):
    assert torch.tensor(value, dtype=torch.float32).isfinite().item() is finite
    if finite:
        assert validate_scores([[value]], groups(1), "mine") == [[value]]
        return
    with pytest.raises(RewardError, match=rf"returned {re.escape(str(value))}, which is infinite in float32, at .* number below 3\.4e38"):
        validate_scores([[value]], groups(1), "mine")


def test_scores_that_only_together_leave_float32_are_refused():
    large = Fixed("a", [[0.0, 3e38]])
    stack = RewardStack([WeightedReward(large), WeightedReward(Fixed("b", [[0.0, 3e38]]), 0.5)])
    message = r"rewards of group 0, completion 1 add up to 4\.5e\+38, which is not finite in float32 \(a x 1, b x 0\.5\)\. Lower"
    with pytest.raises(RewardError, match=message):
        stack.score(groups(2))
    with pytest.raises(RewardError, match="add up to inf"):
        RewardStack([WeightedReward(large, 1e300)]).score(groups(2))


def test_a_flat_list_keeps_what_can_be_used_and_says_of_the_rest_where_it_stands():
    # a group of one completion and one of three; the prompts of groups() share one id
    scores, faults = check_flat([1, math.nan, "x", math.nan], groups(1, 3))
    assert scores == [1.0, None, None, None]
    assert [(fault.text, fault.completions, fault.whole) for fault in faults] == [
        ("returned nan for 2 of 4 completions (first index 1, prompt id)", 2, False),
        ("returned 'x' (str) for 1 of 4 completions (index 2, prompt id)", 1, False),
    ]


def test_an_array_that_is_none_after_all_is_refused():
    class Odd:
        ndim = 1

        def tolist(self):
            return 5.0

    _, faults = check_flat(Odd(), groups(2))
    assert [(fault.cause, fault.completions, fault.whole) for fault in faults] == [("returned a Odd", 2, True)]


def test_a_reward_that_may_skip_is_asked_for_what_it_skipped():
    class Skipping(Fixed):
        def score_or_skip(self, groups):
            return self.scores, Skipped(1, "one is missing")

    stack = RewardStack([WeightedReward(Skipping("a", [[1.0, None]])), WeightedReward(Fixed("b", [[2.0, 2.0]]))])
    scores = stack.score(groups(2))
    assert scores.rewards == [[3.0, 2.0]]
    assert (scores.skipped, scores.warnings) == ({"a": 1}, ("one is missing",))


def test_an_unknown_name_gets_the_nearest_known_one():
    assert str(unknown_reward("repitition", ["length", "repetition"])) == (
        "unknown reward 'repitition'. Did you mean 'repetition'? Known are length, repetition."
    )
    assert "Did you mean" not in str(unknown_reward("zzz", ["length"]))
