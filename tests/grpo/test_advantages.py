"""Advantages against numbers worked out by hand, and the laws that hold for every baseline and scale."""

from __future__ import annotations

import itertools
from math import nan, sqrt

import pytest
import torch
from torch import Tensor

from gemma_grpo.grpo.advantages import BASELINES, SCALES, flat_group_fraction, flat_groups, gdpo_advantages, group_advantages

VARIANTS = list(itertools.product(BASELINES, SCALES))


def advantages(
    rewards: list[list[float]] | Tensor,
    baseline: str = "leave_one_out",
    scale: str = "none",
    lengths: list[list[int]] | None = None,
    clip: float | None = None,
) -> Tensor:
    values = torch.as_tensor(rewards, dtype=torch.float64)
    tokens = torch.ones(values.shape, dtype=torch.long) if lengths is None else torch.tensor(lengths)
    return group_advantages(values, tokens, baseline=BASELINES[baseline], scale=SCALES[scale], clip=clip)


def some_rewards() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_rows(actual: Tensor, expected: list[list[float]], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def test_leave_one_out_subtracts_the_mean_of_the_others() -> None:
    # 1 - (2 + 6)/2, 2 - (1 + 6)/2, 6 - (1 + 2)/2
    assert_rows(advantages([[1.0, 2.0, 6.0]]), [[-3.0, -1.5, 4.5]])


def test_mean_subtracts_the_mean_of_all() -> None:
    assert_rows(advantages([[1.0, 2.0, 6.0]], "mean"), [[-2.0, -1.0, 3.0]])


def test_length_weighted_subtracts_the_mean_per_token() -> None:
    # (1*5 + 2*3 + 6*2) / 10 = 2.3
    assert_rows(advantages([[1.0, 2.0, 6.0]], "length_weighted", lengths=[[5, 3, 2]]), [[-1.3, -0.3, 3.7]])


def test_length_weighted_counts_an_empty_completion_as_one_token() -> None:
    # (1*1 + 5*3) / 4 = 4
    assert_rows(advantages([[1.0, 5.0]], "length_weighted", lengths=[[0, 3]]), [[-3.0, 1.0]])


def test_leave_one_out_is_the_mean_baseline_enlarged_by_g_over_g_minus_one() -> None:
    rewards = some_rewards()
    torch.testing.assert_close(advantages(rewards), advantages(rewards, "mean") * 4 / 3)


def test_group_scale_divides_by_each_groups_std() -> None:
    # std with ddof 1: of (0, 2) sqrt(2), of (0, 20) 10 sqrt(2)
    small, large = 1 / (sqrt(2) + 1e-4), 10 / (10 * sqrt(2) + 1e-4)
    assert_rows(advantages([[0.0, 2.0], [0.0, 20.0]], "mean", "group"), [[-small, small], [-large, large]])


def test_batch_scale_divides_by_the_std_of_the_centred_rewards() -> None:
    # centred -1 1 -3 3: sum of squares 20, ddof 1; that the second prompt pays 100 more is no part of it
    std = sqrt(20 / 3) + 1e-4
    assert_rows(advantages([[0.0, 2.0], [100.0, 106.0]], "mean", "batch"), [[-1 / std, 1 / std], [-3 / std, 3 / std]])


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("factor", [2.0**30, 1e25, 1e37])  # the squares of the last two are infinite in float32
def test_large_rewards_teach_what_small_ones_do(scale: str, factor: float) -> None:
    rewards = torch.tensor([[0.0, 1.0, 2.0]]) * factor
    lengths = torch.ones(1, 3, dtype=torch.long)
    given = group_advantages(rewards, lengths, baseline=BASELINES["mean"], scale=SCALES[scale])
    assert given[0].tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-6)  # less their mean, over their std of 1


def test_clip_limits_both_sides() -> None:
    assert_rows(advantages([[0.0, 2.0], [0.0, 20.0]], "mean", clip=5.0), [[-1.0, 1.0], [-5.0, 5.0]])


@pytest.mark.parametrize(("baseline", "scale"), VARIANTS)
def test_unscored_completions_change_nothing_and_get_nothing(baseline: str, scale: str) -> None:
    whole = advantages([[1.0, 2.0, 6.0], [3.0, 1.0, 1.0]], baseline, scale)
    holed = advantages([[1.0, nan, 2.0, 6.0], [3.0, 1.0, 1.0, nan]], baseline, scale)
    assert holed[0, 1] == 0
    assert holed[1, 3] == 0
    torch.testing.assert_close(holed[0, [0, 2, 3]], whole[0])
    torch.testing.assert_close(holed[1, :3], whole[1])


@pytest.mark.parametrize(("baseline", "scale"), VARIANTS)
def test_a_group_with_one_scored_completion_or_none_teaches_nothing(baseline: str, scale: str) -> None:
    rows = advantages([[nan, 5.0, nan], [nan, nan, nan], [1.0, 2.0, 4.0]], baseline, scale)
    assert not rows[:2].any()
    torch.testing.assert_close(rows[2:], advantages([[1.0, 2.0, 4.0]], baseline, scale))


@pytest.mark.parametrize(("baseline", "scale"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(baseline: str, scale: str, dtype: torch.dtype) -> None:
    rewards = torch.tensor([[0.1] * 7, [-12345.678] * 7], dtype=dtype)  # 7 x 0.1 is not 0.7 in binary
    lengths = torch.tensor([[3, 1, 4, 1, 5, 9, 2]] * 2)
    assert not group_advantages(rewards, lengths, baseline=BASELINES[baseline], scale=SCALES[scale]).any()


@pytest.mark.parametrize(("baseline", "scale"), VARIANTS)
def test_a_constant_per_prompt_changes_nothing(baseline: str, scale: str) -> None:
    rewards, offsets = some_rewards(), torch.tensor([[100.0], [-3.0], [0.5], [7.0], [0.0]], dtype=torch.float64)
    torch.testing.assert_close(advantages(rewards + offsets, baseline, scale), advantages(rewards, baseline, scale))


@pytest.mark.parametrize(("baseline", "scale"), VARIANTS)
def test_a_factor_on_rewards_scales_raw_advantages_only(baseline: str, scale: str) -> None:
    rewards = some_rewards()
    factor = 5.0 if scale == "none" else 1.0
    torch.testing.assert_close(
        advantages(5 * rewards, baseline, scale), factor * advantages(rewards, baseline, scale), rtol=1e-3, atol=0
    )  # 1e-3: the epsilon beside the std


@pytest.mark.parametrize(("baseline", "scale"), VARIANTS)
def test_permuting_completions_and_groups_permutes_advantages(baseline: str, scale: str) -> None:
    rewards = some_rewards()
    groups, members = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 3, 1, 0])
    permuted = advantages(rewards[groups][:, members], baseline, scale)
    torch.testing.assert_close(permuted, advantages(rewards, baseline, scale)[groups][:, members])


@pytest.mark.parametrize(("baseline", "scale"), VARIANTS)
def test_doubling_the_batch_changes_advantages_by_the_degree_of_freedom_only(baseline: str, scale: str) -> None:
    rewards = some_rewards()
    once, twice = advantages(rewards, baseline, scale), advantages(torch.cat([rewards, rewards]), baseline, scale)[:5]
    # batch std of 20 values with squares S: sqrt(S / 19); of 40: sqrt(2 S / 39)
    factor = sqrt(39 / 38) if scale == "batch" else 1.0
    torch.testing.assert_close(twice, factor * once, rtol=1e-4, atol=0)


def test_advantages_carry_no_gradient() -> None:
    rewards = some_rewards().requires_grad_()
    assert not advantages(rewards).requires_grad


def test_gdpo_normalises_each_reward_within_its_group_first() -> None:
    # both parts become -1, 1 / -1, 1 over their own std sqrt(2) and 1000 sqrt(2); then weights 1 and 0.5 and the batch std
    parts = torch.tensor([[[0.0, 2.0], [0.0, 2.0]], [[0.0, 2000.0], [2000.0, 0.0]]], dtype=torch.float64)
    one, two = 1 / (sqrt(2) + 1e-4), 0.5 * 1000 / (1000 * sqrt(2) + 1e-4)
    agree, differ = one + two, one - two
    std = sqrt(2 * (agree**2 + differ**2) / 3) + 1e-4
    actual = gdpo_advantages(
        parts,
        torch.tensor([1.0, 0.5], dtype=torch.float64),
        torch.ones(2, 2, dtype=torch.long),
        baseline=BASELINES["mean"],
        scale=SCALES["batch"],
    )
    assert_rows(actual, [[-agree / std, agree / std], [-differ / std, differ / std]])


def gdpo(parts: Tensor, weights: Tensor, scale: str, clip: float | None = None) -> Tensor:
    lengths = torch.ones(parts.shape[1:], dtype=torch.long)
    return gdpo_advantages(parts, weights, lengths, baseline=BASELINES["leave_one_out"], scale=SCALES[scale], clip=clip)


def test_gdpo_leaves_out_what_a_part_could_not_score() -> None:
    first, second = some_rewards(), some_rewards().flip(0)
    first[0, 1] = nan  # scored by the second part only
    first[2, 3] = second[2, 3] = nan  # by none
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    actual = gdpo(torch.stack([first, second]), weights, "none")
    by_hand = advantages(first, scale="group") + 2 * advantages(second, scale="group")
    torch.testing.assert_close(actual, by_hand)
    assert actual[0, 1] != 0
    assert actual[2, 3] == 0
    counted = torch.ones(5, 4, dtype=torch.bool)
    counted[2, 3] = False  # the batch std is over what at least one part scored
    torch.testing.assert_close(gdpo(torch.stack([first, second]), weights, "batch"), by_hand / (by_hand[counted].std() + 1e-4))


@pytest.mark.parametrize("scale", SCALES)
def test_gdpo_of_equal_rewards_is_exactly_zero_and_never_above_the_clip(scale: str) -> None:
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert not gdpo(torch.full((2, 3, 7), 0.1, dtype=torch.float64), weights, scale).any()
    assert gdpo(torch.stack([some_rewards()] * 2), weights, scale, clip=0.25).abs().max() == 0.25


@pytest.mark.parametrize("factor", [1e-2, 1e3])
def test_gdpo_ignores_the_unit_of_each_reward(factor: float) -> None:
    first, second = some_rewards(), some_rewards().flip(0)
    weights = torch.tensor([1.0, 1.0], dtype=torch.float64)
    plain = gdpo(torch.stack([first, second]), weights, "batch")
    torch.testing.assert_close(gdpo(torch.stack([first, factor * second]), weights, "batch"), plain, rtol=0, atol=0.05)


def test_flat_groups_are_those_without_two_different_rewards() -> None:
    rewards = torch.tensor([[1.0, 1.0, 1.0], [1.0, nan, 1.0], [nan, 2.0, nan], [nan, nan, nan], [1.0, 1.1, 1.0]])
    assert flat_groups(rewards).tolist() == [True, True, True, True, False]
    assert flat_group_fraction(rewards) == pytest.approx(0.8)
