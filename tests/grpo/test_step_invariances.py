"""What must not change a whole step of the real model - order, padding, a constant in the rewards - and what must.

The laws of test_invariances.py hold for tables; here they hold through prompts, grouped attention and adapters. How a step is cut
into passes is test_step_memory.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from gemma_grpo.data.batch import PolicyBatch
from gemma_grpo.reward.base import RewardStack, WeightedReward
from gemma_grpo.reward.functions import FunctionReward
from gemma_grpo.reward.shaping import par
from gemma_grpo.types import RolloutGroup

REWARDS = [[0.1, 0.9, 0.4], [0.3, -0.5, 0.2], [1.2, 0.0, 0.7], [-0.3, 0.6, 0.5]]
ROUNDING = 2e-5
"""Of the largest entry of the gradient: float32 sums in another order."""
AGGREGATIONS = ["dr_grpo", "grpo", "dapo", "bnpo"]
NO_KL: dict[str, Any] = {"kl.placement": "off"}


def permuted(rows: list[Any], order: list[int]) -> list[Any]:
    return [rows[index] for index in order]


def with_completions(group: RolloutGroup, order: list[int]) -> RolloutGroup:
    return replace(group, completions=tuple(group.completions[index] for index in order))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_order_of_groups_and_within_a_group_does_not_matter(world, difference, aggregation):
    config = world.config(batch_size=4, **{"loss.aggregation": aggregation, "advantage.scale": "batch"})
    expected, sums = world.gradient(config, world.batch(config))
    groups = [with_completions(group, [2, 0, 1]) for group in permuted(list(world.groups), [3, 1, 0, 2])]
    rewards = [permuted(row, [2, 0, 1]) for row in permuted(REWARDS, [3, 1, 0, 2])]
    gradient, permuted_sums = world.gradient(config, world.batch(config, rewards, groups))
    assert difference(gradient, expected) < ROUNDING
    assert permuted_sums == pytest.approx(sums, rel=1e-4, abs=1e-6)


def test_a_training_is_the_same_however_its_prompts_are_accumulated(train_tiny, difference):
    # eps: with Adam's own 1e-8 a gradient of rounding size would move a weight as far as any other
    runs = [
        train_tiny(batch_size=size, gradient_accumulation_steps=4 // size, max_steps=1, **{"optimizer.eps": 1e-3}) for size in (4, 2, 1)
    ]
    for run in runs[1:]:
        assert run.text("samples.jsonl") == runs[0].text("samples.jsonl")
        assert difference(run.adapter(), runs[0].adapter()) < 1e-5
        assert run.metrics("grad_norm") == pytest.approx(runs[0].metrics("grad_norm"), rel=1e-4)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_doubling_the_whole_batch_keeps_the_gradient(world, difference, aggregation):
    # unscaled advantages: a batch std has one degree of freedom less than it has members, which doubling changes
    config = world.config(batch_size=8, **{"loss.aggregation": aggregation})
    expected, sums = world.gradient(config, world.batch(config))
    gradient, double = world.gradient(config, world.batch(config, REWARDS * 2, world.groups * 2))
    assert difference(gradient, expected) < ROUNDING
    assert double["loss"] == pytest.approx(sums["loss"], rel=1e-4)
    assert double["tokens"] == 2 * sums["tokens"] == 90


@pytest.mark.parametrize("scale", ["batch", "group", "none"])
def test_equal_rewards_leave_exactly_no_policy_gradient(world, scale):
    config = world.config(**NO_KL, **{"advantage.scale": scale})
    gradient, sums = world.gradient(config, world.batch(config, [[0.1] * 3, [-7.3] * 3, [1e6] * 3, [0.0] * 3]))
    assert all(value.count_nonzero() == 0 for value in gradient.values())
    assert sums["loss"] == 0.0


@pytest.mark.parametrize("scale", ["batch", "group", "none"])
def test_equal_rewards_leave_the_kl_gradient(world, difference, scale):
    config = world.config(**{"advantage.scale": scale})
    gradient, sums = world.gradient(config, world.batch(config, [[0.1] * 3] * 4))
    assert sums["policy_loss"] == 0.0
    assert sums["loss"] == sums["kl_loss"] > 0.0
    assert all(value.count_nonzero() > 0 for value in gradient.values())
    batch = world.batch(config)
    ref = batch.ref_logprobs

    def penalty(logprobs, entropies):
        gap = torch.where(batch.completion_mask, ref - logprobs, 0.0)
        k3 = gap.exp() - 1 - gap
        return 0.05 * (torch.exp(logprobs - logprobs.detach()) * k3).sum() / (12 * 6)

    assert difference(gradient, world.plain_gradient(penalty, batch)[1]) < 1e-4


def test_one_group_of_equal_rewards_changes_nothing_for_the_others(world, difference):
    # its tokens stay in the denominator: 1 / (completions x limit) of the whole step
    config = world.config(**NO_KL)
    flat = [REWARDS[0], [0.5] * 3, *REWARDS[2:]]
    gradient, _ = world.gradient(config, world.batch(config, flat))
    kept = [0, 2, 3]
    without, _ = world.gradient(config, world.batch(config, permuted(REWARDS, kept), permuted(list(world.groups), kept)))
    assert difference(gradient, {name: value * 3 / 4 for name, value in without.items()}) < ROUNDING


# ---- padding and what lies behind the stop token


def padded(batch: PolicyBatch, *, left: int, right: int, filler: int) -> PolicyBatch:
    """More padding: left of the prompts, right of the completions, with arbitrary token ids and numbers in it."""
    real = batch.completion_mask

    def wider(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else pad(torch.where(real, values, -3.0), (0, right), value=-3.0)

    return replace(
        batch,
        prompt_ids=pad(torch.where(batch.prompt_mask, batch.prompt_ids, filler), (left, 0), value=filler),
        prompt_mask=pad(batch.prompt_mask, (left, 0)),
        completion_ids=pad(torch.where(real, batch.completion_ids, filler), (0, right), value=filler),
        completion_mask=pad(real, (0, right)),
        sampling_logprobs=wider(batch.sampling_logprobs),
        ref_logprobs=wider(batch.ref_logprobs),
    )


@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 3), (5, 0), (4, 2)])
@pytest.mark.parametrize("aggregation", ["dr_grpo", "dapo"])
def test_padding_changes_nothing(world, difference, left, right, aggregation):
    config = world.config(**{"loss.aggregation": aggregation})
    expected, sums = world.gradient(config, world.batch(config))
    gradient, padded_sums = world.gradient(config, padded(world.batch(config), left=left, right=right, filler=211))
    assert difference(gradient, expected) < 1e-6
    assert padded_sums == pytest.approx(sums, rel=1e-6, abs=1e-9)


def test_the_stop_token_itself_is_learned(world, difference):
    config = world.config()
    batch = world.batch(config)
    last = batch.completion_mask & ~pad(batch.completion_mask, (0, 1))[..., 1:]
    expected, _ = world.gradient(config, batch)
    shorter, _ = world.gradient(config, replace(batch, completion_mask=batch.completion_mask & ~last))
    assert difference(shorter, expected) > 1e-2
    other, _ = world.gradient(config, replace(batch, completion_ids=torch.where(last, 1, batch.completion_ids)))
    assert difference(other, expected) > 1e-2


# ---- rewards


@pytest.mark.parametrize("scale", ["batch", "group", "none"])
@pytest.mark.parametrize("baseline", ["leave_one_out", "mean", "length_weighted"])
def test_a_constant_per_prompt_in_the_rewards_changes_nothing(world, difference, scale, baseline):
    config = world.config(**{"advantage.scale": scale, "advantage.baseline": baseline})
    expected, _ = world.gradient(config, world.batch(config))
    shifted = [[reward + shift for reward in row] for row, shift in zip(REWARDS, (3.0, -2.5, 0.0, 16.0), strict=True)]
    assert difference(world.gradient(config, world.batch(config, shifted))[0], expected) < ROUNDING


@pytest.mark.parametrize("scale", ["batch", "group"])
def test_the_unit_of_the_rewards_does_not_matter_where_they_are_scaled(world, difference, scale):
    config = world.config(**{"advantage.scale": scale})
    expected, _ = world.gradient(config, world.batch(config))
    larger = [[100 * reward for reward in row] for row in REWARDS]
    # up to the 1e-4 added to the std, which is about 0.4 here
    assert difference(world.gradient(config, world.batch(config, larger))[0], expected) < 1e-3


def test_unscaled_rewards_scale_the_policy_gradient(world, difference):
    config = world.config(**NO_KL)
    expected, _ = world.gradient(config, world.batch(config))
    larger = [[4 * reward for reward in row] for row in REWARDS]
    assert difference(world.gradient(config, world.batch(config, larger))[0], {name: 4 * v for name, v in expected.items()}) < ROUNDING


def test_par_shaped_rewards_do_not_move_when_reward_and_reference_move_together(world):
    def raw(shift: float) -> Callable[..., list[float]]:
        return lambda completion_ids, **columns: [sum(ids) / 500 + shift for ids in completion_ids]

    def shaped(shift: float) -> torch.Tensor:
        references = par(lambda groups: [0.5 * n + shift for n in range(len(groups))])
        stack = RewardStack([WeightedReward(FunctionReward(raw(shift), "raw"), shape=references)])
        return torch.tensor(stack.score(world.groups).rewards)

    torch.testing.assert_close(shaped(4.0), shaped(0.0), rtol=0, atol=1e-6)
    assert shaped(0.0).std() > 0.01


@pytest.mark.parametrize("group_size", [1, 3])
def test_kl_in_the_reward_is_a_reward(world, difference, group_size):
    """With placement reward, the step equals one without KL whose rewards had beta x (sampling - reference) taken off."""
    config = world.config(**{"kl.placement": "reward", "kl.beta": 0.2}, batch_size=group_size)
    batch = world.batch(config)
    gap = torch.where(batch.completion_mask, batch.sampling_logprobs - batch.ref_logprobs, 0.0).sum(-1)
    rewards = (torch.tensor(REWARDS) - 0.2 * gap).tolist()
    plain = world.config(**NO_KL, batch_size=group_size)
    expected, _ = world.gradient(plain, world.batch(plain, rewards))
    assert difference(world.gradient(config, batch)[0], expected) < ROUNDING
