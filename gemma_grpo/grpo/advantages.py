"""Rewards [N G] -> advantages [N G]: baselines, scales, several rewards. Tensors in, tensors out.

Owns what an advantage is worth; where rewards come from is reward/, what an advantage does is loss.py. Choices are
functions, picked once from BASELINES and SCALES. NaN marks a completion no reward could score: it is left out of every
mean and std and gets advantage 0, as does the only scored completion of a group, which has nothing to be compared with.

A group's advantages depend on differences of rewards only: each group is first shifted so that its lowest reward is 0.
That makes equal rewards give exactly 0, not a rounding error that a small std would blow up into a unit-size update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Baseline = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rewards [N G] with 0 where unscored, scored [N G], lengths [N G]) -> what to subtract [N G]."""
Scale = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(centred [N G], rewards [N G], usable [N G]) -> what to divide by, broadcastable to [N G], never 0."""

STD_EPSILON = 1e-4
"""Added to every std before dividing, as in GRPO (arXiv:2402.03300) and TRL: a std of 0 divides nothing by nothing."""
FLAT_SPREAD = 1e-8
"""Rewards of a group closer together than this count as equal in the metrics."""


def group_advantages(
    rewards: Float[Tensor, "N G"],
    lengths: Int[Tensor, "N G"],
    *,
    baseline: Baseline,
    scale: Scale,
    clip: float | None = None,
) -> Float[Tensor, "N G"]:
    """(rewards - baseline) / scale, limited to +-clip; detached.

    `rewards` holds NaN where unscored, `lengths` counts tokens. Group structure must be whole: over several ranks,
    gather first, because the batch scale is one number for the whole step.
    """
    scored = ~rewards.isnan()
    usable = _usable(scored)
    shifted = _shifted(rewards.detach(), scored)
    centred = torch.where(usable, shifted - baseline(shifted, scored, lengths), 0.0)
    return _limited(centred / scale(centred, shifted, usable), clip)


def gdpo_advantages(
    parts: Float[Tensor, "K N G"],
    weights: Float[Tensor, " K"],
    lengths: Int[Tensor, "N G"],
    *,
    baseline: Baseline,
    scale: Scale,
    clip: float | None = None,
) -> Float[Tensor, "N G"]:
    """Each of K rewards normalised within its group first, then their weighted sum divided by `scale`.

    Keeps a reward of small spread from vanishing beside one of large spread, at the price of the group std's bias.
    With the "mean" baseline and the "batch" scale this is GDPO (arXiv:2601.05242); `scale` sees the weighted sum in the
    place of the rewards. A part that is NaN counts as 0 for that completion; all parts NaN: advantage 0.
    """
    by_part = [group_advantages(part, lengths, baseline=baseline, scale=group_std) for part in parts]
    combined = torch.einsum("kng,k->ng", torch.stack(by_part), weights.to(parts))
    usable = _usable(~parts.isnan()).any(0)
    return _limited(combined / scale(combined, combined, usable), clip)


def flat_groups(rewards: Float[Tensor, "N G"]) -> Bool[Tensor, " N"]:
    """True for a group that teaches nothing: all scored rewards equal, or fewer than two scored."""
    scored = ~rewards.isnan()
    return _shifted(rewards, scored).amax(-1) <= FLAT_SPREAD


def flat_group_fraction(rewards: Float[Tensor, "N G"]) -> float:
    """Share of flat groups, the metric frac_reward_zero_std: above 0.3 the batch is mostly wasted."""
    return float(flat_groups(rewards).float().mean())


def leave_one_out(rewards: Float[Tensor, "N G"], scored: Bool[Tensor, "N G"], lengths: Int[Tensor, "N G"]) -> Float[Tensor, "N G"]:
    """Mean reward of the group's other completions (RLOO, arXiv:2402.14740): E[gradient] is exactly the policy gradient."""
    others = scored.sum(-1, keepdim=True) - scored.long()
    return (_total(rewards, scored) - rewards) / others.clamp(min=1)


def mean(rewards: Float[Tensor, "N G"], scored: Bool[Tensor, "N G"], lengths: Int[Tensor, "N G"]) -> Float[Tensor, "N G"]:
    """Mean reward of the group, itself included (GRPO, arXiv:2402.03300): shrinks the gradient by 1 - 1/G.

    With the KL penalty in the loss that is a penalty of beta x G / (G - 1).
    """
    return (_total(rewards, scored) / scored.sum(-1, keepdim=True).clamp(min=1)).expand_as(rewards)


def length_weighted(rewards: Float[Tensor, "N G"], scored: Bool[Tensor, "N G"], lengths: Int[Tensor, "N G"]) -> Float[Tensor, "N G"]:
    """Mean reward weighted by length (OPO, arXiv:2505.23585): near the least gradient variance.

    An empty completion weighs as much as one token.
    """
    tokens = torch.where(scored, lengths.clamp(min=1), 0).to(rewards.dtype)
    weighted = (rewards * tokens).sum(-1, keepdim=True) / tokens.sum(-1, keepdim=True).clamp(min=1)
    return weighted.expand_as(rewards)


def batch_std(centred: Float[Tensor, "N G"], rewards: Float[Tensor, "N G"], usable: Bool[Tensor, "N G"]) -> Float[Tensor, "1 1"]:
    """One std for the batch, of the centred rewards: what differs between prompts is not noise to be divided out.

    (TRL's "batch" takes the raw rewards, spread between prompts included.) Idea: Lite-PPO, arXiv:2508.08221.
    """
    return _std(centred.reshape(1, -1), usable.reshape(1, -1)) + STD_EPSILON


def group_std(centred: Float[Tensor, "N G"], rewards: Float[Tensor, "N G"], usable: Bool[Tensor, "N G"]) -> Float[Tensor, "N 1"]:
    """Std of each group's rewards (GRPO, arXiv:2402.03300): turns a group that differs by noise only into a full-size update."""
    return _std(rewards, usable) + STD_EPSILON


def unscaled(centred: Float[Tensor, "N G"], rewards: Float[Tensor, "N G"], usable: Bool[Tensor, "N G"]) -> Float[Tensor, "1 1"]:
    """Divide by 1 (Dr. GRPO, arXiv:2503.20783): advantages, and with them beta, are in units of reward."""
    return centred.new_ones(1, 1)


BASELINES: Mapping[str, Baseline] = {"leave_one_out": leave_one_out, "mean": mean, "length_weighted": length_weighted}
SCALES: Mapping[str, Scale] = {"batch": batch_std, "group": group_std, "none": unscaled}


def _usable(scored: Tensor) -> Tensor:
    """Scored, and with something to be compared with."""
    return scored & (scored.sum(-1, keepdim=True) >= 2)


def _shifted(rewards: Tensor, scored: Tensor) -> Tensor:
    lowest = torch.where(scored, rewards, torch.inf).amin(-1, keepdim=True)
    return torch.where(scored, rewards - lowest, 0.0)


def _total(rewards: Tensor, scored: Tensor) -> Tensor:
    return torch.where(scored, rewards, 0.0).sum(-1, keepdim=True)


def _std(values: Tensor, counted: Tensor) -> Tensor:
    """Std over the last axis of the counted values, ddof 1; 0 for fewer than two."""
    count = counted.sum(-1, keepdim=True)
    average = torch.where(counted, values, 0.0).sum(-1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(counted, values - average, 0.0)
    # in units of a power of two, which rounds nothing: squares beyond 1e19 are infinite in float32, and all advantages then 0
    exponent = (torch.frexp(centred.abs().amax(-1, keepdim=True)).exponent - 1).clamp(-126, 126)
    squares = (torch.ldexp(centred, -exponent) ** 2).sum(-1, keepdim=True)
    return torch.ldexp((squares / (count - 1).clamp(min=1)).sqrt(), exponent)


def _limited(advantages: Tensor, clip: float | None) -> Tensor:
    return advantages if clip is None else advantages.clamp(-clip, clip)
