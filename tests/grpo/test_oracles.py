"""Gradients against enumeration, and optima against closed forms, on policies small enough to write down every group.

A World lists every reply; an expectation over groups is then a finite sum, and E[autograd] can be compared with the analytic
gradient to 1e-12 rather than within sampling noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from gemma_grpo.grpo.advantages import BASELINES, SCALES, group_advantages
from gemma_grpo.grpo.loss import KL_ESTIMATORS, POLICY_LOSSES, kl_reward_penalty, policy_objective, step_kl, token_weights

LOSSES = {name: partial(loss, clip_low=0.2, clip_high=0.2) for name, loss in POLICY_LOSSES.items()}


@dataclass(frozen=True)
class World:
    """Every reply as (state, token) pairs; a policy is a table of logits [S V]."""

    states: Tensor  # (Y, C)
    tokens: Tensor  # (Y, C)
    mask: Tensor  # (Y, C)
    rewards: Tensor  # (Y,)
    reference: Tensor  # (S, V) logits

    def logprobs(self, logits: Tensor) -> Tensor:
        return torch.where(self.mask, logits.log_softmax(-1)[self.states, self.tokens], 0.0)  # (Y, C)

    def reply_logprobs(self, logits: Tensor) -> Tensor:
        return self.logprobs(logits).sum(-1)


def bandit() -> World:
    column = torch.arange(4)[:, None]
    rewards = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64)
    reference = torch.tensor([[0.6, 0.3, -0.2, -0.5]], dtype=torch.float64)
    return World(torch.zeros(4, 1, dtype=torch.long), column, torch.ones(4, 1, dtype=torch.bool), rewards, reference)


def replies() -> World:
    # token 0 ends the reply; one or two tokens:  0 | 1 0 | 1 1 | 1 2 | 2 0 | 2 1 | 2 2
    states = torch.tensor([[0, 0], [0, 1], [0, 1], [0, 1], [0, 2], [0, 2], [0, 2]])
    tokens = torch.tensor([[0, 0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]])
    mask = torch.ones(7, 2, dtype=torch.bool)
    mask[0, 1] = False
    rewards = torch.tensor([0.1, 0.9, 0.0, 0.4, 0.2, 1.0, 0.5], dtype=torch.float64)
    reference = torch.tensor([[0.2, 0.5, -0.3], [0.0, 0.7, -0.1], [0.4, -0.6, 0.3]], dtype=torch.float64)
    return World(states, tokens, mask, rewards, reference)


WORLDS = {"bandit": bandit(), "replies": replies()}


def some_logits(world: World) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(world.reference.shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Setup:
    """One way of training; the defaults are the plainest unbiased ones."""

    group_size: int = 2
    loss: str = "ppo"
    baseline: str = "leave_one_out"
    aggregation: str = "dr_grpo"
    kl: str | None = None
    beta: float = 0.0
    reward_beta: float = 0.0
    alpha: float = 0.0


def expected_gradient(world: World, logits: Tensor, setup: Setup) -> Tensor:
    """E over all groups of one prompt of the loss's gradient [S V], on-policy, in units where a dr_grpo token weighs 1 / G."""
    logits = logits.detach().requires_grad_()
    groups = torch.tensor(list(itertools.product(range(len(world.rewards)), repeat=setup.group_size)))  # (M, G)
    flat = groups.reshape(-1)
    chance = world.reply_logprobs(logits).detach()[groups].sum(-1).exp()  # (M,)
    mask, logprobs, ref = world.mask[flat], world.logprobs(logits)[flat], world.logprobs(world.reference)[flat]
    rewards = world.rewards[flat] - kl_reward_penalty(logprobs, ref, mask, beta=setup.reward_beta)
    advantages = group_advantages(
        rewards.reshape(groups.shape),
        mask.sum(-1).reshape(groups.shape),
        baseline=BASELINES[setup.baseline],
        scale=SCALES["none"],
    )
    width = mask.shape[1]
    weights = token_weights(
        mask,
        aggregation=setup.aggregation,
        num_step_completions=1,  # divided by G below, in float64
        num_step_tokens=width,
        max_completion_length=width,
    )
    units = {"dr_grpo": width, "grpo": 1}[setup.aggregation] / setup.group_size
    distribution = logits.log_softmax(-1)
    entropy = -(distribution.exp() * distribution).sum(-1)[world.states][flat]
    loss, _ = policy_objective(
        logprobs,
        logprobs.detach(),
        advantages.reshape(-1),
        mask,
        units * weights.double() * chance.repeat_interleave(setup.group_size)[:, None],
        policy_loss=LOSSES[setup.loss],
        ref_logprobs=ref,
        kl_estimator=KL_ESTIMATORS[setup.kl] if setup.kl else None,
        beta=setup.beta,
        entropy=entropy,
        alpha=setup.alpha,
    )
    return torch.autograd.grad(loss, logits)[0]


def gradient_of(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(function(logits), logits)[0]


def expected_reward(world: World, logits: Tensor) -> Tensor:
    return (world.reply_logprobs(logits).exp() * world.rewards).sum()


def divergence(world: World, logits: Tensor, other: Tensor) -> Tensor:
    mine, theirs = world.reply_logprobs(logits), world.reply_logprobs(other)
    return (mine.exp() * (mine - theirs)).sum()


# ---------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo", "sapo"])
@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_leave_one_out_is_exactly_the_policy_gradient(world: World, loss: str) -> None:
    logits = some_logits(world)
    expected = -gradient_of(partial(expected_reward, world), logits)
    for group_size in (2, 3):
        actual = expected_gradient(world, logits, Setup(group_size=group_size, loss=loss))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_inclusive_mean_shrinks_the_policy_gradient_by_one_minus_one_over_g(world: World) -> None:
    logits = some_logits(world)
    for group_size in (2, 3):
        actual = expected_gradient(world, logits, Setup(group_size=group_size, baseline="mean"))
        expected = -(1 - 1 / group_size) * gradient_of(partial(expected_reward, world), logits)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k2", "ratio_k3", "ratio_k1"])
def test_right_estimators_descend_the_reverse_divergence(estimator: str) -> None:
    world = WORLDS["bandit"]
    logits = some_logits(world)
    expected = gradient_of(lambda x: divergence(world, x, world.reference), logits)
    flat = replace(world, rewards=torch.zeros_like(world.rewards))
    actual = expected_gradient(flat, logits, Setup(kl=estimator, beta=1.0))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_plain_k3_descends_the_forward_divergence() -> None:
    world = WORLDS["bandit"]
    logits = some_logits(world)
    expected = gradient_of(lambda x: divergence(world, world.reference, x), logits)
    flat = replace(world, rewards=torch.zeros_like(world.rewards))
    torch.testing.assert_close(expected_gradient(flat, logits, Setup(kl="k3", beta=1.0)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_k1_in_the_loss_regularises_nothing(world: World) -> None:
    flat = replace(world, rewards=torch.zeros_like(world.rewards))
    actual = expected_gradient(flat, some_logits(world), Setup(kl="k1", beta=1.0))
    torch.testing.assert_close(actual, torch.zeros_like(actual), rtol=0, atol=1e-12)


@pytest.mark.parametrize("baseline", ["leave_one_out", "mean"])
def test_kl_in_the_reward_descends_the_divergence_of_whole_replies(baseline: str) -> None:
    world = WORLDS["replies"]
    logits = some_logits(world)
    expected = gradient_of(lambda x: 0.3 * divergence(world, x, world.reference) - expected_reward(world, x), logits)
    actual = expected_gradient(world, logits, Setup(reward_beta=0.3, baseline=baseline))
    factor = {"leave_one_out": 1.0, "mean": 0.5}[baseline]
    torch.testing.assert_close(actual, factor * expected, rtol=0, atol=1e-12)


def test_entropy_term_ascends_the_entropy() -> None:
    world = WORLDS["bandit"]
    logits = some_logits(world)
    flat = replace(world, rewards=torch.zeros_like(world.rewards))
    expected = -0.7 * gradient_of(lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(), logits)
    torch.testing.assert_close(expected_gradient(flat, logits, Setup(alpha=0.7)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k2", "ratio_k3", "ratio_k1"])
def test_right_estimators_stay_right_off_policy(estimator: str) -> None:
    world = WORLDS["bandit"]
    old, ref = some_logits(world).log_softmax(-1), world.reference.log_softmax(-1)
    logits = (old + torch.tensor([[0.4, -0.3, 0.1, 0.2]], dtype=torch.float64)).requires_grad_()
    values = KL_ESTIMATORS[estimator](logits.log_softmax(-1), ref, old)
    actual = torch.autograd.grad((old.exp() * values).sum(), logits)[0]
    torch.testing.assert_close(actual, gradient_of(lambda x: divergence(world, x, world.reference), logits), rtol=0, atol=1e-12)


def test_k2_and_ratio_k3_agree_sample_by_sample_on_policy() -> None:
    logprobs = torch.tensor([[-0.5, -2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[-1.5, -1.0, -3.5]], dtype=torch.float64)
    for estimator in ("k2", "ratio_k3"):
        values = KL_ESTIMATORS[estimator](logprobs, ref, logprobs.detach())
        gradient = torch.autograd.grad(values.sum(), logprobs)[0]
        torch.testing.assert_close(gradient, (logprobs - ref).detach(), rtol=0, atol=1e-12)  # d x grad log pi


def test_expected_values_of_the_estimators() -> None:
    world = WORLDS["bandit"]
    logprobs, ref = some_logits(world).log_softmax(-1), world.reference.log_softmax(-1)
    exact = divergence(world, logprobs, ref)
    means = {name: (logprobs.exp() * estimator(logprobs, ref, logprobs)).sum() for name, estimator in KL_ESTIMATORS.items()}
    for name in ("k1", "k3", "ratio_k3", "ratio_k1"):
        torch.testing.assert_close(means[name], exact, rtol=0, atol=1e-12)
    assert abs(means["k2"] - exact) > 0.01 * exact


def test_ratio_weighted_estimators_and_step_kl_are_unbiased_under_the_old_policy() -> None:
    world = WORLDS["bandit"]
    old, ref = some_logits(world).log_softmax(-1), world.reference.log_softmax(-1)
    logprobs = torch.roll(old, 1, -1)
    for name in ("ratio_k3", "ratio_k1"):
        mean = (old.exp() * KL_ESTIMATORS[name](logprobs, ref, old)).sum()
        torch.testing.assert_close(mean, divergence(world, logprobs, ref), rtol=0, atol=1e-12)
    mean = (old.exp() * step_kl(logprobs, old, torch.ones_like(old, dtype=torch.bool))).sum()
    torch.testing.assert_close(mean, divergence(world, old, logprobs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", POLICY_LOSSES)
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_policy_losses_pass_gradcheck(loss: str, dual_clip: float | None) -> None:
    old = torch.tensor([[-1.0, -0.7, -2.0], [-0.4, -1.1, -0.9]], dtype=torch.float64)
    offsets = torch.tensor([[0.05, -0.1, 0.4], [-0.5, 0.6, 9.0]], dtype=torch.float64)  # off every kink
    mask = torch.tensor([[True, True, True], [True, True, False]])
    gains = torch.tensor([1.3, -0.8], dtype=torch.float64)

    def value(logprobs: Tensor) -> Tensor:
        if loss == "cispo":  # its detached weight must not see the finite differences
            weight = POLICY_LOSSES["cispo"](old + offsets, old, gains, mask, clip_low=0.2, clip_high=0.25, dual_clip=dual_clip).loss
            return weight / (old + offsets) * logprobs
        return POLICY_LOSSES[loss](logprobs, old, gains, mask, clip_low=0.2, clip_high=0.25, dual_clip=dual_clip).loss

    assert torch.autograd.gradcheck(value, (old + offsets).requires_grad_())


@pytest.mark.parametrize("estimator", ["k1", "k3", "ratio_k3", "ratio_k1"])
def test_kl_estimators_pass_gradcheck(estimator: str) -> None:
    old, ref = torch.tensor([[-1.0, -0.7]], dtype=torch.float64), torch.tensor([[-1.5, -0.2]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: KL_ESTIMATORS[estimator](x, ref, old), (old + 0.3).requires_grad_())


# ---------------------------------------------------------------------------------------------- optima


def fixed_point(world: World, setup: Setup, rate: float) -> Tensor:
    """Logits where the expected gradient vanishes, by natural-gradient steps (gradient / visits / probability)."""
    logits = world.reference.clone()
    for _ in range(400):
        gradient = expected_gradient(world, logits, setup)
        visits = torch.zeros(len(logits), dtype=torch.float64)
        chance = world.reply_logprobs(logits).exp()[:, None].expand_as(world.mask)
        visits.index_add_(0, world.states[world.mask], chance[world.mask])
        step = gradient / (visits[:, None] * logits.softmax(-1))
        logits = logits - rate * step
        if step.abs().max() < 1e-10:
            return logits
    raise AssertionError(f"no fixed point: the last step was {step.abs().max():.1e}")


def exponential_law(world: World, beta: float) -> Tensor:
    return (world.reply_logprobs(world.reference) + world.rewards / beta).softmax(-1)


def distance(world: World, logits: Tensor, target: Tensor) -> float:
    return float((world.reply_logprobs(logits).exp() - target).abs().sum() / 2)


@pytest.mark.parametrize(
    "setup",
    [
        Setup(kl="ratio_k3", beta=0.5),
        Setup(kl="k2", beta=0.5),
        Setup(kl="ratio_k1", beta=0.5),
        Setup(kl="ratio_k3", beta=0.5, group_size=3),
        Setup(reward_beta=0.5),
        Setup(reward_beta=0.5, baseline="mean"),
        Setup(reward_beta=0.5, baseline="length_weighted"),
    ],
    ids=str,
)
def test_the_optimum_is_the_exponentially_tilted_reference(setup: Setup) -> None:
    world = WORLDS["bandit"]
    target = exponential_law(world, 0.5)
    assert distance(world, world.reference, target) > 0.2
    assert distance(world, fixed_point(world, setup, rate=1.0), target) < 1e-7


def test_the_optimum_has_the_value_of_the_log_partition_function() -> None:
    world = WORLDS["replies"]
    logits = fixed_point(world, Setup(reward_beta=0.5), rate=0.5)
    value = expected_reward(world, logits) - 0.5 * divergence(world, logits, world.reference)
    partition = (world.reply_logprobs(world.reference) + world.rewards / 0.5).logsumexp(-1)
    torch.testing.assert_close(value, 0.5 * partition, rtol=0, atol=1e-9)


def test_inclusive_mean_with_the_penalty_in_the_loss_enlarges_beta() -> None:
    world = WORLDS["bandit"]
    logits = fixed_point(world, Setup(kl="ratio_k3", beta=0.5, baseline="mean"), rate=1.0)
    assert distance(world, logits, exponential_law(world, 0.5 * 2 / (2 - 1))) < 1e-7


def test_plain_k3_ends_at_the_hyperbolic_law() -> None:
    world = WORLDS["bandit"]
    ref = world.reference.softmax(-1)[0]
    low, high = float(world.rewards.max()), float(world.rewards.max()) + 10.0
    for _ in range(100):  # the larger root is unique above max r: the sum falls from infinity
        middle = (low + high) / 2
        low, high = (middle, high) if float((0.5 * ref / (middle - world.rewards)).sum()) > 1 else (low, middle)
    logits = fixed_point(world, Setup(kl="k3", beta=0.5), rate=0.3)
    assert distance(world, logits, 0.5 * ref / (low - world.rewards)) < 1e-7
    assert distance(world, logits, exponential_law(world, 0.5)) > 0.02


def test_entropy_bonus_is_a_temperature_on_the_reference() -> None:
    world = WORLDS["bandit"]
    logits = fixed_point(world, Setup(kl="ratio_k3", beta=0.5, alpha=0.25), rate=0.5)
    target = (world.reference.log_softmax(-1)[0] * 0.5 / 0.75 + world.rewards / 0.75).softmax(-1)
    assert distance(world, logits, target) < 1e-7


@pytest.mark.parametrize("aggregation", ["dr_grpo", "grpo"])
@pytest.mark.parametrize("baseline", ["leave_one_out", "mean", "length_weighted"])
def test_kl_in_the_reward_has_the_whole_reply_optimum_whatever_the_normalisation(aggregation: str, baseline: str) -> None:
    world = WORLDS["replies"]
    logits = fixed_point(world, Setup(reward_beta=0.5, aggregation=aggregation, baseline=baseline), rate=0.5)
    assert distance(world, logits, exponential_law(world, 0.5)) < 1e-7


def test_kl_in_the_loss_is_optimal_node_by_node() -> None:
    world = WORLDS["replies"]
    logits = fixed_point(world, Setup(kl="ratio_k3", beta=0.5), rate=0.5)
    ref, pi = world.reference.log_softmax(-1), logits.softmax(-1)
    leaves = world.rewards[1:].reshape(2, 3)
    values = torch.cat([world.rewards[:1], (pi[1:] * leaves).sum(-1)])  # Q of the first token, later KL ignored
    torch.testing.assert_close(pi[1:], (ref[1:] + leaves / 0.5).softmax(-1), rtol=0, atol=1e-8)
    torch.testing.assert_close(pi[0], (ref[0] + values / 0.5).softmax(-1), rtol=0, atol=1e-8)
    assert distance(world, logits, exponential_law(world, 0.5)) > 0.01


def test_own_length_normalisation_moves_the_optimum_of_kl_in_the_loss() -> None:
    world = WORLDS["replies"]
    constant, own = (fixed_point(world, Setup(kl="ratio_k3", beta=0.5, aggregation=name), rate=0.5) for name in ("dr_grpo", "grpo"))
    assert distance(world, own, world.reply_logprobs(constant).exp()) > 0.003  # both exact to 1e-8
