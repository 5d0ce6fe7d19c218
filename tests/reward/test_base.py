from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import pytest
import torch

from gemma_grpo.reward.base import RewardError, RewardStack, WeightedReward, unknown_reward, validate_flat, validate_scores
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
    assert validate_flat(np.array([1, 2]), 2, "mine") == [1.0, 2.0]


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

    with pytest.raises(RewardError, match=r"index 0"):
        validate_flat([Shy()], 1, "mine")


def test_an_unknown_name_gets_the_nearest_known_one():
    assert str(unknown_reward("repitition", ["length", "repetition"])) == (
        "unknown reward 'repitition'. Did you mean 'repetition'? Known are length, repetition."
    )
    assert "Did you mean" not in str(unknown_reward("zzz", ["length"]))
