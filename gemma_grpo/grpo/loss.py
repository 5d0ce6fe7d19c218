"""The policy objective: surrogates, KL estimators, aggregation, entropy. Tensors in, tensors out; no settings, no model.

Axes: B completions (N x G), C tokens. `mask` is True on the tokens trained on, the stop token included; whatever padding
holds, even NaN, contributes exactly 0 to values and gradients. Log-probabilities are natural, float32, all at the sampling
temperature. Everything is a loss to minimise. Choices are functions, picked once from POLICY_LOSSES, KL_ESTIMATORS and
AGGREGATIONS.

The KL penalty and the entropy bonus share the weights of the policy loss, so that beta is in units of advantage per nat and
alpha : beta is exactly a temperature on the reference: the optimum is ref^(beta / (beta + alpha)) exp(A / (beta + alpha)).
With a scaled advantage (batch std s) the penalty in units of reward is beta x s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Nats beyond which a log-ratio is cut before exp, gradient 0: exp(20) is 5e8, while exp(90) is infinite in float32."""
SAPO_TEMPERATURES = (1.0, 1.05)
"""Steepness of the gate for positive and for negative advantages (arXiv:2511.20347)."""


class TokenLoss(NamedTuple):
    """Per-token losses [B C], 0 on padding, and which tokens met a limit on their ratio."""

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor], TokenLoss]
"""(logprobs [B C], old_logprobs [B C], advantages [B], mask [B C]): a member of POLICY_LOSSES with its numbers bound."""
KLEstimator = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logprobs, ref_logprobs, old_logprobs), each [B C] -> nats per token [B C]."""


def ppo_loss(
    logprobs: Float[Tensor, "B C"],
    old_logprobs: Float[Tensor, "B C"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B C"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> TokenLoss:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), per token (PPO, arXiv:1707.06347; GRPO, arXiv:2402.03300).

    `dual_clip` caps the loss of a negative advantage at -dual_clip x A, without gradient above (arXiv:1912.09729).
    """
    ratio = _ratio(_masked(logprobs - old_logprobs, mask))
    return _clipped(ratio, advantages[:, None], mask, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def gspo_loss(
    logprobs: Float[Tensor, "B C"],
    old_logprobs: Float[Tensor, "B C"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B C"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> TokenLoss:
    """PPO's loss on the sequence ratio exp(mean over tokens of log ratio), repeated on every token (GSPO, arXiv:2507.18071).

    The "grpo" weights, 1 / (completions x length), then sum to GSPO's mean over sequences; constant weights count a sequence
    once per token, which takes GSPO's 1 / length out of its gradient again. The paper clips at 3e-4 below, 4e-4 above.
    """
    log_ratio = _masked(logprobs - old_logprobs, mask)
    ratio = _ratio(log_ratio.sum(-1, keepdim=True) / _lengths(mask)).expand_as(logprobs)
    return _clipped(ratio, advantages[:, None], mask, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def cispo_loss(
    logprobs: Float[Tensor, "B C"],
    old_logprobs: Float[Tensor, "B C"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B C"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> TokenLoss:
    """-clip(ratio) A logprobs with the clipped ratio detached: no token loses its gradient (CISPO, arXiv:2506.13585).

    Limits are 1 - clip_low and 1 + clip_high, as everywhere here; the setting "epsilon_high = 5" of other programs, an upper
    limit of 5 on the ratio itself, is clip_high = 4. `dual_clip` caps the ratio of negative advantages, too.
    """
    ratio = _ratio(_masked(logprobs - old_logprobs, mask)).detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    if dual_clip is not None:
        weight = torch.where(advantages[:, None] < 0, weight.clamp(max=dual_clip), weight)
    loss = -weight * advantages[:, None] * _masked(logprobs, mask)
    return TokenLoss(_masked(loss, mask), mask & (ratio < 1 - clip_low), mask & (ratio > 1 + clip_high))


def sapo_loss(
    logprobs: Float[Tensor, "B C"],
    old_logprobs: Float[Tensor, "B C"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B C"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> TokenLoss:
    """-(4 / tau) sigmoid(tau (ratio - 1)) A: a soft gate in the place of clipping (SAPO, arXiv:2511.20347).

    Gradient weight sech^2(tau (ratio - 1) / 2), 1 at ratio 1. The limits are not used: the gate is bounded by itself. Its value
    at ratio 1 is -2 A / tau, so compare gradients with other losses, not values.
    """
    ratio = _ratio(_masked(logprobs - old_logprobs, mask))
    gains = advantages[:, None]
    positive, negative = (torch.full_like(gains, value) for value in SAPO_TEMPERATURES)
    tau = torch.where(gains > 0, positive, negative)
    loss = -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * gains
    nothing = torch.zeros_like(mask)
    return TokenLoss(_masked(loss, mask), nothing, nothing)


POLICY_LOSSES: Mapping[str, Callable[..., TokenLoss]] = {"ppo": ppo_loss, "gspo": gspo_loss, "cispo": cispo_loss, "sapo": sapo_loss}


def k1(logprobs: Float[Tensor, "B C"], ref_logprobs: Float[Tensor, "B C"], old_logprobs: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """d = logprobs - ref_logprobs. Unbiased value, but as a loss its expected gradient is 0: it regularises nothing."""
    return logprobs - ref_logprobs


def k2(logprobs: Float[Tensor, "B C"], ref_logprobs: Float[Tensor, "B C"], old_logprobs: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """ratio d^2 / 2, the ratio detached. Biased value; its expected gradient is that of KL(policy || reference)."""
    return _ratio(logprobs - old_logprobs).detach() * (logprobs - ref_logprobs) ** 2 / 2


def k3(logprobs: Float[Tensor, "B C"], ref_logprobs: Float[Tensor, "B C"], old_logprobs: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """exp(-d) - 1 + d (GRPO eq. 4, arXiv:2402.03300; http://joschu.net/blog/kl-approx.html). Never negative, unbiased value.

    As a loss it descends the *other* divergence, KL(reference || policy) (arXiv:2510.01555): prefer ratio_k3.
    """
    gap = (ref_logprobs - logprobs).clamp(max=LOG_RATIO_LIMIT)
    return torch.expm1(gap) - gap


def ratio_k3(
    logprobs: Float[Tensor, "B C"], ref_logprobs: Float[Tensor, "B C"], old_logprobs: Float[Tensor, "B C"]
) -> Float[Tensor, "B C"]:
    """ratio x k3, the ratio differentiable: value and gradient of KL(policy || reference), also off-policy (arXiv:2512.02556)."""
    return _ratio(logprobs - old_logprobs) * k3(logprobs, ref_logprobs, old_logprobs)


def ratio_k1(
    logprobs: Float[Tensor, "B C"], ref_logprobs: Float[Tensor, "B C"], old_logprobs: Float[Tensor, "B C"]
) -> Float[Tensor, "B C"]:
    """ratio x k1, the ratio differentiable: right in expectation like ratio_k3, with one more zero-mean term of noise."""
    return _ratio(logprobs - old_logprobs) * (logprobs - ref_logprobs)


KL_ESTIMATORS: Mapping[str, KLEstimator] = {"k1": k1, "k2": k2, "k3": k3, "ratio_k3": ratio_k3, "ratio_k1": ratio_k1}


def step_kl(logprobs: Float[Tensor, "B C"], old_logprobs: Float[Tensor, "B C"], mask: Bool[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """Per-token estimate of KL(old || policy) in nats, (ratio - 1) - log ratio: k3 for tokens drawn from the old policy."""
    log_ratio = _masked(logprobs - old_logprobs, mask).clamp(max=LOG_RATIO_LIMIT)
    return torch.expm1(log_ratio) - log_ratio


def sampler_weights(
    old_logprobs: Float[Tensor, "B C"],
    sampling_logprobs: Float[Tensor, "B C"],
    mask: Bool[Tensor, "B C"],
    *,
    cap: float | None,
    limit: float | None = None,
) -> Float[Tensor, "B C"]:
    """min(exp(old - sampling), cap), detached: corrects for a sampler that is not quite the policy (TIS); 0 on padding.

    Multiplies the policy loss and the KL penalty. Truncated importance sampling: V-trace, arXiv:1802.01561. No cap: 1. Tokens whose
    ratio is outside [1 / limit, limit] weigh 0 (IcePop, arXiv:2510.18855): such a token tells of the engines, not of the policy.
    """
    ratio = _ratio(_masked(old_logprobs - sampling_logprobs, mask))
    weight = torch.ones_like(ratio) if cap is None else ratio.clamp(max=cap)
    kept = mask if limit is None else mask & (ratio <= limit) & (ratio >= 1 / limit)
    return _masked(weight, kept).detach()


def sampler_metrics(
    old_logprobs: Float[Tensor, "B C"],
    sampling_logprobs: Float[Tensor, "B C"],
    mask: Bool[Tensor, "B C"],
    weight: Float[Tensor, "B C"],
    *,
    cap: float | None,
) -> dict[str, Tensor]:
    """Sums over tokens of what sampler_weights made, and of how far the sampler is: they add up over micro-batches and ranks.

    gap_sum is |old - sampling|; sampler_kl_sum estimates KL(sampler || old) (k3); capped and masked count tokens.
    """
    gap = _masked(old_logprobs - sampling_logprobs, mask)
    over = mask & (weight > 0) & (_ratio(gap) > (torch.inf if cap is None else cap))
    return {
        "gap_sum": gap.abs().sum(),
        "sampler_kl_sum": step_kl(old_logprobs, sampling_logprobs, mask).sum(),
        "weight_sum": weight.sum(),
        "weight_square_sum": (weight**2).sum(),
        "capped": over.sum(),
        "masked": (mask & (weight == 0)).sum(),
    }


def sampling_gap(
    old_logprobs: Float[Tensor, "B C"], sampling_logprobs: Float[Tensor, "B C"], mask: Bool[Tensor, "B C"]
) -> Float[Tensor, ""]:
    """Largest |old - sampling| log-probability: how far the sampler is from the scored policy; 0 for an empty batch."""
    gap = _masked(old_logprobs - sampling_logprobs, mask).abs()
    return gap.max() if gap.numel() else gap.new_zeros(())


def kl_reward_penalty(
    sampling_logprobs: Float[Tensor, "B C"], ref_logprobs: Float[Tensor, "B C"], mask: Bool[Tensor, "B C"], *, beta: float
) -> Float[Tensor, " B"]:
    """beta x sum over tokens of log(policy / reference): what KL "in the reward" subtracts from each reward. Detached.

    Subtract it *before* the baseline. The optimum is then exactly ref(y) exp(r(y) / beta) over whole sequences, whatever the
    baseline, scale or length normalisation, because there every penalised reward of a prompt is equal and every advantage 0.
    Here beta is in units of reward per nat, since the scale divides reward and penalty alike. The penalty is spread over the
    whole sequence, future tokens included, which a per-token penalty in the loss is not (arXiv:2512.21852).
    """
    return beta * _masked(sampling_logprobs - ref_logprobs, mask).detach().sum(-1)


class StepCounts(NamedTuple):
    """What the denominators of one optimizer step are made of."""

    completions: int
    tokens: int
    max_completion_length: int
    micro_batches: int


def token_weights(
    mask: Bool[Tensor, "B C"],
    *,
    aggregation: str,
    num_step_completions: int,
    num_step_tokens: int,
    max_completion_length: int,
    num_micro_batches: int = 1,
) -> Float[Tensor, "B C"]:
    """Weight of each token's loss, 0 on padding, such that micro-batch losses *sum* to the loss of the optimizer step.

    The step's counts cover all its micro-batches and ranks, so they are taken before any split. Which weight: AGGREGATIONS.
    """
    counts = StepCounts(num_step_completions, max(1, num_step_tokens), max_completion_length, num_micro_batches)
    return torch.where(mask, AGGREGATIONS[aggregation](mask, counts), 0.0)


def dr_grpo(mask: Bool[Tensor, "B C"], counts: StepCounts) -> Float[Tensor, "1 1"]:
    """1 / (completions x longest allowed length): a constant, unbiased in length (Dr. GRPO, arXiv:2503.20783)."""
    return torch.full((1, 1), 1 / (counts.completions * counts.max_completion_length), device=mask.device)


def grpo(mask: Bool[Tensor, "B C"], counts: StepCounts) -> Float[Tensor, "B 1"]:
    """1 / (completions x own length) (GRPO, arXiv:2402.03300): a bad reply is punished less per token the longer it is."""
    return 1 / (counts.completions * _lengths(mask).float())


def dapo(mask: Bool[Tensor, "B C"], counts: StepCounts) -> Float[Tensor, "1 1"]:
    """1 / tokens of the whole step (DAPO, arXiv:2503.14476): every token weighs the same."""
    return torch.full((1, 1), 1 / counts.tokens, device=mask.device)


def bnpo(mask: Bool[Tensor, "B C"], counts: StepCounts) -> Float[Tensor, "1 1"]:
    """1 / (tokens of this micro-batch x micro-batches), as TRL's "bnpo": depends on the micro-batches, by design."""
    return (1 / (mask.sum().clamp(min=1).float() * counts.micro_batches)).reshape(1, 1)


AGGREGATIONS: Mapping[str, Callable[[Tensor, StepCounts], Tensor]] = {"dr_grpo": dr_grpo, "grpo": grpo, "dapo": dapo, "bnpo": bnpo}


def policy_objective(
    logprobs: Float[Tensor, "B C"],
    old_logprobs: Float[Tensor, "B C"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B C"],
    weights: Float[Tensor, "B C"],
    *,
    policy_loss: PolicyLoss,
    ref_logprobs: Float[Tensor, "B C"] | None = None,
    kl_estimator: KLEstimator | None = None,
    beta: float = 0.0,
    entropy: Float[Tensor, "B C"] | None = None,
    alpha: float = 0.0,
    sampler_weight: Float[Tensor, "B C"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """sum over tokens of weights x (sampler_weight x (policy loss + beta KL) - alpha entropy), and what to log of it.

    No kl_estimator: no penalty, but ref_logprobs, when given, are still measured. All metrics are detached sums that add up
    over micro-batches and ranks: policy_loss, kl_loss (beta included) and entropy_loss (alpha included) sum to the loss of the
    step; kl_sum, kl_step_sum, entropy_sum, clipped_low and clipped_high are per token of `tokens` once divided by it;
    `completions` turns kl_sum into nats per sequence. kl_sum is always ratio_k3, whatever the loss uses.
    """
    surrogate = policy_loss(logprobs, old_logprobs, advantages, mask)
    correction = weights if sampler_weight is None else weights * sampler_weight
    policy_term = (correction * surrogate.loss).sum()
    kl_term = _penalty(kl_estimator, logprobs, ref_logprobs, old_logprobs, mask, correction) * beta
    entropy_term = logprobs.new_zeros(()) if entropy is None else -alpha * (weights * _masked(entropy, mask)).sum()
    metrics = {
        "policy_loss": policy_term,
        "kl_loss": kl_term,
        "entropy_loss": entropy_term,
        "clipped_low": surrogate.clipped_low.sum(),
        "clipped_high": surrogate.clipped_high.sum(),
        "kl_step_sum": step_kl(logprobs, old_logprobs, mask).sum(),
        "tokens": mask.sum(),
        "completions": torch.tensor(len(mask), device=mask.device),
    }
    if ref_logprobs is not None:
        metrics["kl_sum"] = _penalty(ratio_k3, logprobs.detach(), ref_logprobs, old_logprobs, mask, mask.to(weights))
    if entropy is not None:
        metrics["entropy_sum"] = _masked(entropy, mask).sum()
    return policy_term + kl_term + entropy_term, {name: value.detach() for name, value in metrics.items()}


def _penalty(
    estimator: KLEstimator | None, logprobs: Tensor, ref_logprobs: Tensor | None, old_logprobs: Tensor, mask: Tensor, weights: Tensor
) -> Tensor:
    if estimator is None:
        return logprobs.new_zeros(())
    if ref_logprobs is None:
        raise ValueError("A KL estimator was given without ref_logprobs. Pass the reference's log-probabilities, or kl_estimator=None.")
    real = [_masked(values, mask) for values in (logprobs, ref_logprobs, old_logprobs)]
    return (weights * estimator(*real)).sum()


def _clipped(ratio: Tensor, gains: Tensor, mask: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None) -> TokenLoss:
    loss = torch.maximum(-ratio * gains, -ratio.clamp(1 - clip_low, 1 + clip_high) * gains)
    if dual_clip is not None:
        loss = torch.where(gains < 0, torch.minimum(loss, -dual_clip * gains), loss)
    low = mask & (gains < 0) & (ratio < 1 - clip_low)
    high = mask & (gains > 0) & (ratio > 1 + clip_high)
    return TokenLoss(_masked(loss, mask), low, high)


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """0 on padding, in value and gradient, even where padding holds NaN (a product with 0 would keep it)."""
    return torch.where(mask, values, 0.0)


def _lengths(mask: Tensor) -> Tensor:
    return mask.sum(-1, keepdim=True).clamp(min=1)
