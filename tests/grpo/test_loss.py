"""Losses, estimators and weights against numbers worked out by hand; padding and extreme values leave no trace."""

from __future__ import annotations

from functools import partial
from math import exp, inf, log, nan

import pytest
import torch
from torch import Tensor

from gemma_grpo.grpo.loss import (
    KL_ESTIMATORS,
    POLICY_LOSSES,
    TokenLoss,
    kl_reward_penalty,
    policy_objective,
    sampler_metrics,
    sampler_weights,
    sampling_gap,
    step_kl,
    token_weights,
)

PPO = partial(POLICY_LOSSES["ppo"], clip_low=0.2, clip_high=0.3)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def surrogate(name: str, ratios: list[float], advantage: float, dual_clip: float | None = None) -> tuple[TokenLoss, list[float]]:
    """The loss of one completion whose tokens have these ratios to probability 0.5, and its gradient with respect to logprobs."""
    old = torch.full((1, len(ratios)), log(0.5), dtype=torch.float64)
    logprobs = (old + row(*ratios).log()).requires_grad_()
    mask = torch.ones_like(old, dtype=torch.bool)
    gains = torch.tensor([advantage], dtype=torch.float64)
    result = POLICY_LOSSES[name](logprobs, old, gains, mask, clip_low=0.2, clip_high=0.3, dual_clip=dual_clip)
    gradient = torch.autograd.grad(result.loss.sum(), logprobs)[0]
    return result, gradient[0].tolist()


# ---------------------------------------------------------------------------------------------- surrogates


@pytest.mark.parametrize(
    ("advantage", "ratio", "value", "gradient"),
    [
        (2.0, 1.0, -2.0, -2.0),
        (2.0, 1.25, -2.5, -2.5),
        (2.0, 1.5, -2.6, 0.0),  # clipped above: 1.3 x 2
        (2.0, 0.5, -1.0, -1.0),  # below, but the way back is open
        (-2.0, 0.9, 1.8, 1.8),
        (-2.0, 0.5, 1.6, 0.0),  # clipped below: 0.8 x 2
        (-2.0, 1.5, 3.0, 3.0),  # above, but the way back is open
        (0.0, 5.0, 0.0, 0.0),
    ],
)
def test_ppo_clips_only_where_the_ratio_has_gone_far_enough(advantage: float, ratio: float, value: float, gradient: float) -> None:
    result, gradients = surrogate("ppo", [ratio], advantage)
    assert result.loss.item() == pytest.approx(value)
    assert gradients == pytest.approx([gradient])


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_dual_clip_caps_the_loss_of_negative_advantages(name: str) -> None:
    result, gradients = surrogate(name, [5.0], -2.0, dual_clip=3.0)
    assert result.loss.item() == pytest.approx(6.0)
    assert gradients == [0.0]
    result, gradients = surrogate(name, [2.5], -2.0, dual_clip=3.0)
    assert result.loss.item() == pytest.approx(5.0)
    assert gradients == pytest.approx([5.0])


def test_dual_clip_leaves_positive_advantages_alone() -> None:
    assert surrogate("ppo", [5.0], 2.0, dual_clip=3.0)[0].loss.item() == pytest.approx(-2.6)


def test_ppo_counts_the_tokens_it_clips() -> None:
    positive, _ = surrogate("ppo", [0.5, 1.0, 1.5], 1.0)
    negative, _ = surrogate("ppo", [0.5, 1.0, 1.5], -1.0)
    assert positive.clipped_high.tolist() == [[False, False, True]]
    assert not positive.clipped_low.any()
    assert negative.clipped_low.tolist() == [[True, False, False]]
    assert not negative.clipped_high.any()


def test_gspo_uses_the_geometric_mean_of_the_ratios() -> None:
    # sqrt(0.8 x 1.8) = 1.2: inside the limits, although the second token alone is not
    result, gradients = surrogate("gspo", [0.8, 1.8], 2.0)
    assert result.loss[0].tolist() == pytest.approx([-2.4, -2.4])
    # one sequence loss of -2.4 on each of two tokens; each log-probability moves it by 1/2: 2 x -2.4 / 2
    assert gradients == pytest.approx([-2.4, -2.4])


def test_gspo_clips_whole_sequences() -> None:
    result, gradients = surrogate("gspo", [1.0, 4.0], 2.0)  # sqrt(4) = 2 > 1.3
    assert result.loss[0].tolist() == pytest.approx([-2.6, -2.6])
    assert gradients == [0.0, 0.0]
    assert result.clipped_high.tolist() == [[True, True]]


def test_gspo_with_grpo_weights_is_the_mean_of_the_sequence_losses() -> None:
    old = torch.full((2, 3), -1.0, dtype=torch.float64)
    logprobs = old + torch.tensor([[0.1, 0.2, 9.0], [-0.1, 0.1, 0.15]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    gains = torch.tensor([1.0, -2.0], dtype=torch.float64)
    tokens = POLICY_LOSSES["gspo"](logprobs, old, gains, mask, clip_low=0.2, clip_high=0.3).loss
    total = (token_weights(mask, aggregation="grpo", num_step_completions=2, num_step_tokens=5, max_completion_length=3) * tokens).sum()
    assert total.item() == pytest.approx((-exp(0.15) + 2 * exp(0.05)) / 2)


@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.8), (1.0, 1.0), (1.25, 1.25), (9.0, 1.3)])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_limits_the_weight_but_keeps_every_gradient(ratio: float, weight: float, advantage: float) -> None:
    result, gradients = surrogate("cispo", [ratio], advantage)
    assert gradients == pytest.approx([-weight * advantage])
    assert result.loss.item() == pytest.approx(-weight * advantage * log(0.5 * ratio))
    assert (result.clipped_low.item(), result.clipped_high.item()) == (ratio < 0.8, ratio > 1.3)


def test_cispo_dual_clip_caps_the_weight_of_negative_advantages() -> None:
    assert surrogate("cispo", [9.0], -2.0, dual_clip=1.1)[1] == pytest.approx([2.2])
    assert surrogate("cispo", [9.0], 2.0, dual_clip=1.1)[1] == pytest.approx([-2.6])


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.0), (-2.0, 1.05)])
def test_sapo_gates_softly(advantage: float, tau: float) -> None:
    gate = 1 / (1 + exp(-tau * 0.5))
    result, gradients = surrogate("sapo", [1.5], advantage)
    assert result.loss.item() == pytest.approx(-4 / tau * gate * advantage)
    assert gradients == pytest.approx([-4 * gate * (1 - gate) * 1.5 * advantage])  # d ratio / d logprob = ratio
    assert not result.clipped_low.any()
    assert not result.clipped_high.any()


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("advantage", [1.5, -0.5])
def test_every_loss_has_the_reinforce_gradient_at_ratio_one(name: str, advantage: float) -> None:
    result, gradients = surrogate(name, [1.0, 1.0, 1.0], advantage)
    assert gradients == pytest.approx([-advantage] * 3)
    assert not (result.clipped_low | result.clipped_high).any()


# ---------------------------------------------------------------------------------------------- KL


def test_kl_estimators_by_hand() -> None:
    logprobs, ref, old = row(log(0.5)), row(log(0.2)), row(log(0.4))
    d, ratio = log(2.5), 1.25
    expected = {"k1": d, "k2": ratio * d * d / 2, "k3": 0.4 - 1 + d, "ratio_k3": ratio * (0.4 - 1 + d), "ratio_k1": ratio * d}
    assert {name: estimator(logprobs, ref, old).item() for name, estimator in KL_ESTIMATORS.items()} == pytest.approx(expected)


def test_step_kl_by_hand_and_zero_on_padding() -> None:
    values = step_kl(row(log(0.5), nan), row(log(0.4), 0.0), torch.tensor([[True, False]]))
    assert values[0].tolist() == pytest.approx([0.25 - log(1.25), 0.0])


def test_kl_reward_penalty_sums_real_tokens() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    logprobs = torch.tensor([[-1.0, -2.0, nan], [-1.0, -1.0, -1.0]], requires_grad=True)
    ref = torch.tensor([[-1.5, -1.0, 0.0], [-2.0, -3.0, -0.5]])
    penalty = kl_reward_penalty(logprobs, ref, mask, beta=0.1)
    assert penalty.tolist() == pytest.approx([0.1 * (0.5 - 1.0), 0.1 * (1.0 + 2.0 - 0.5)])
    assert not penalty.requires_grad


# ---------------------------------------------------------------------------------------------- sampler


def test_sampler_weights_are_capped_ratios_without_gradient() -> None:
    old = row(log(0.5), log(0.9), nan).requires_grad_()
    weights = sampler_weights(old, row(log(0.4), log(0.1), 0.0), torch.tensor([[True, True, False]]), cap=2.0)
    assert weights[0].tolist() == pytest.approx([1.25, 2.0, 0.0])
    assert not weights.requires_grad


def test_tokens_beyond_the_mask_weigh_nothing_and_its_limits_are_inside() -> None:
    # ratios 0.5, 0.49, 2, 2.1, 1.25, and padding
    old = row(log(0.5), log(0.49), log(1.0), log(0.84), log(0.5), nan)
    sampling = row(log(1.0), log(1.0), log(0.5), log(0.4), log(0.4), 0.0)
    mask = torch.tensor([[True] * 5 + [False]])
    weights = sampler_weights(old, sampling, mask, cap=1.5, limit=2.0 + 1e-6)
    assert weights[0].tolist() == pytest.approx([0.5, 0.0, 1.5, 0.0, 1.25, 0.0])
    # without a cap the mask alone: whatever is inside counts in full
    assert sampler_weights(old, sampling, mask, cap=None, limit=2.0 + 1e-6)[0].tolist() == [1, 0, 1, 0, 1, 0]


def test_a_masked_token_is_neither_in_the_loss_nor_in_the_kl_penalty() -> None:
    logprobs = row(log(0.5), log(0.5)).requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    weight = sampler_weights(logprobs, row(log(0.5), log(0.1)), mask, cap=2.0, limit=4.0)  # ratios 1 and 5
    objective = {"policy_loss": PPO, "kl_estimator": KL_ESTIMATORS["ratio_k3"], "beta": 0.5}
    given = (logprobs, logprobs.detach(), torch.tensor([1.0]), mask, torch.ones(1, 2))
    loss, metrics = policy_objective(*given, **objective, ref_logprobs=row(log(0.25), log(0.25)), sampler_weight=weight)
    assert metrics["policy_loss"].item() == pytest.approx(-1.0)
    assert metrics["kl_loss"].item() == pytest.approx(0.5 * (0.5 - 1 + log(2)))
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0, 1] == 0
    assert logprobs.grad[0, 0] != 0


def test_what_is_logged_of_the_samplers_weights_by_hand_and_adds_up() -> None:
    # ratios 1.25, 4 (capped at 2), 5 (masked), and padding
    old, sampling = row(log(0.5), log(0.8), log(0.5), nan), row(log(0.4), log(0.2), log(0.1), 0.0)
    mask = torch.tensor([[True, True, True, False]])
    weight = sampler_weights(old, sampling, mask, cap=2.0, limit=4.5)
    sums = {name: float(value) for name, value in sampler_metrics(old, sampling, mask, weight, cap=2.0).items()}
    assert sums == pytest.approx(
        {
            "gap_sum": log(1.25) + log(4) + log(5),
            "sampler_kl_sum": (0.25 - log(1.25)) + (3 - log(4)) + (4 - log(5)),
            "weight_sum": 3.25,
            "weight_square_sum": 1.25**2 + 4,
            "capped": 1,
            "masked": 1,
        }
    )
    parts = [sampler_metrics(*(x[:, a:b] for x in (old, sampling, mask, weight)), cap=2.0) for a, b in ((0, 1), (1, 4))]
    assert {name: float(parts[0][name] + parts[1][name]) for name in sums} == pytest.approx(sums)


def test_sampling_gap_is_the_largest_distance_on_real_tokens() -> None:
    assert sampling_gap(row(-1.0, -2.0, 5.0), row(-1.1, -1.5, nan), torch.tensor([[True, True, False]])).item() == pytest.approx(0.5)
    nothing = torch.zeros(0, 3)
    assert sampling_gap(nothing, nothing, nothing.bool()).item() == 0


# ---------------------------------------------------------------------------------------------- aggregation

MASK = torch.tensor([[True, True, True, True], [True, False, False, False]])
# rows of the step elsewhere: 2 more completions of 3 and 2 tokens, so 4 completions and 10 tokens in all


@pytest.mark.parametrize(
    ("aggregation", "first", "second"),
    [
        ("dr_grpo", 1 / (4 * 8), 1 / (4 * 8)),
        ("grpo", 1 / (4 * 4), 1 / (4 * 1)),
        ("dapo", 1 / 10, 1 / 10),
        ("bnpo", 1 / (5 * 2), 1 / (5 * 2)),
    ],
)
def test_token_weights_by_hand(aggregation: str, first: float, second: float) -> None:
    weights = token_weights(
        MASK, aggregation=aggregation, num_step_completions=4, num_step_tokens=10, max_completion_length=8, num_micro_batches=2
    )
    torch.testing.assert_close(weights, torch.tensor([[first] * 4, [second, 0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("aggregation", ["dr_grpo", "grpo", "dapo", "bnpo"])
def test_empty_completions_weigh_nothing_and_divide_by_nothing(aggregation: str) -> None:
    empty = torch.zeros(2, 3, dtype=torch.bool)
    assert not token_weights(empty, aggregation=aggregation, num_step_completions=2, num_step_tokens=0, max_completion_length=3).any()


# ---------------------------------------------------------------------------------------------- objective


def two_completions() -> dict[str, Tensor]:
    return {
        "logprobs": torch.tensor([[log(0.5), log(0.6)], [log(0.3), log(0.2)]], dtype=torch.float64),
        "old_logprobs": torch.tensor([[log(0.4), log(0.6)], [log(0.6), log(0.9)]], dtype=torch.float64),
        "advantages": torch.tensor([2.0, -1.0], dtype=torch.float64),
        "mask": torch.tensor([[True, True], [True, False]]),
        "weights": torch.tensor([[0.25, 0.25], [0.5, 0.0]], dtype=torch.float64),
    }


def test_objective_by_hand() -> None:
    ref = torch.tensor([[log(0.25), log(0.6)], [log(0.6), 0.0]], dtype=torch.float64)
    entropy = torch.tensor([[1.0, 2.0], [3.0, nan]], dtype=torch.float64)
    correction = torch.tensor([[2.0, 1.0], [0.5, 0.0]], dtype=torch.float64)
    loss, metrics = policy_objective(
        **two_completions(),
        policy_loss=PPO,
        ref_logprobs=ref,
        kl_estimator=KL_ESTIMATORS["k1"],
        beta=0.1,
        entropy=entropy,
        alpha=0.01,
        sampler_weight=correction,
    )
    # ratios 1.25, 1, 0.5 (clipped to 0.8): token losses -2.5, -2, 0.8
    policy = 0.25 * 2 * -2.5 + 0.25 * 1 * -2 + 0.5 * 0.5 * 0.8
    kl = 0.1 * (0.25 * 2 * log(2) + 0.25 * 0 + 0.5 * 0.5 * log(0.5))
    bonus = -0.01 * (0.25 * 1 + 0.25 * 2 + 0.5 * 3)
    assert loss.item() == pytest.approx(policy + kl + bonus)
    expected = {
        "policy_loss": policy,
        "kl_loss": kl,
        "entropy_loss": bonus,
        "clipped_low": 1,
        "clipped_high": 0,
        "tokens": 3,
        "completions": 2,
        "entropy_sum": 6.0,
        "kl_step_sum": (0.25 - log(1.25)) + (0.5 - 1 - log(0.5)),
        "kl_sum": 1.25 * (0.5 - 1 + log(2)) + 0.5 * (2 - 1 - log(2)),
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)


def test_objective_at_ratio_one_is_minus_the_weighted_advantages() -> None:
    inputs = two_completions() | {"old_logprobs": two_completions()["logprobs"]}
    loss, metrics = policy_objective(**inputs, policy_loss=PPO)
    assert loss.item() == pytest.approx(-(2.0 * 0.5 - 1.0 * 0.5))
    assert metrics["kl_step_sum"] == metrics["clipped_low"] == metrics["clipped_high"] == 0
    assert "kl_sum" not in metrics


def test_reference_without_estimator_is_measured_but_not_penalised() -> None:
    inputs = two_completions()
    bare, _ = policy_objective(**inputs, policy_loss=PPO)
    loss, metrics = policy_objective(**inputs, policy_loss=PPO, ref_logprobs=inputs["old_logprobs"] - 1.0, beta=5.0)
    assert loss == bare
    assert metrics["kl_sum"] > 0


def test_metrics_carry_no_gradient() -> None:
    inputs = two_completions()
    inputs["logprobs"].requires_grad_()
    _, metrics = policy_objective(
        **inputs, policy_loss=PPO, ref_logprobs=inputs["old_logprobs"], kl_estimator=KL_ESTIMATORS["ratio_k3"], entropy=inputs["logprobs"]
    )
    assert not any(value.requires_grad for value in metrics.values())


def test_a_penalty_without_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="without ref_logprobs"):
        policy_objective(**two_completions(), policy_loss=PPO, kl_estimator=KL_ESTIMATORS["k3"], beta=0.1)


@pytest.mark.parametrize("loss", POLICY_LOSSES)
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("junk", [nan, inf, -inf])
def test_padding_contributes_exactly_nothing_whatever_it_holds(loss: str, estimator: str, junk: float) -> None:
    def run(fill: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        inputs = two_completions()
        mask, weights = inputs["mask"], inputs["weights"]
        old, ref, entropy = (torch.where(mask, inputs["old_logprobs"] + offset, fill) for offset in (0.0, -0.3, 3.0))
        logprobs = torch.where(mask, inputs["logprobs"], fill).requires_grad_()
        value, metrics = policy_objective(
            logprobs,
            old,
            inputs["advantages"],
            mask,
            weights,
            policy_loss=partial(POLICY_LOSSES[loss], clip_low=0.2, clip_high=0.3, dual_clip=3.0),
            ref_logprobs=ref,
            kl_estimator=KL_ESTIMATORS[estimator],
            beta=0.1,
            entropy=entropy,
            alpha=0.1,
            sampler_weight=sampler_weights(old, old, mask, cap=2.0),
        )
        return value, torch.autograd.grad(value, logprobs)[0], metrics

    plain, gradient, metrics = run(-1.0)
    junk_value, junk_gradient, junk_metrics = run(junk)
    assert junk_value == plain
    assert torch.equal(junk_gradient, gradient)
    assert gradient[1, 1] == 0
    assert metrics == junk_metrics


@pytest.mark.parametrize("loss", POLICY_LOSSES)
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("advantage", [5.0, -5.0])
@pytest.mark.parametrize("gap", [-1e4, -100.0, 100.0, 1e4])
def test_values_and_gradients_stay_finite_however_far_apart_the_policies_are(
    loss: str, estimator: str, advantage: float, gap: float
) -> None:
    logprobs = torch.full((1, 2), -2e4, requires_grad=True)
    value, metrics = policy_objective(
        logprobs,
        logprobs.detach() - gap,
        torch.tensor([advantage]),
        torch.ones(1, 2, dtype=torch.bool),
        torch.full((1, 2), 0.5),
        policy_loss=partial(POLICY_LOSSES[loss], clip_low=0.2, clip_high=0.3),
        ref_logprobs=logprobs.detach() + gap,
        kl_estimator=KL_ESTIMATORS[estimator],
        beta=1.0,
    )
    assert value.isfinite()
    assert torch.autograd.grad(value, logprobs)[0].isfinite().all()
    assert all(metric.isfinite() for metric in metrics.values())
