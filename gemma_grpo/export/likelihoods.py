"""What models make of the same tokens: of each its log-probability and the likeliest token, and how far two models are apart.

The tokens are replies of the trained policy to held-out prompts. Owns the limits within which an export counts as the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemma_grpo.data.batch import GroupBatch, pad_groups
from gemma_grpo.model.attention import GroupLayout
from gemma_grpo.model.gemma import Gemma, ModelRole
from gemma_grpo.model.logprobs import shifted
from gemma_grpo.stopping import check

MAX_APART_FP32 = 1e-4
"""Nats by which float32 may move a token's log-probability where the same sum is made in another order.
Seen on the small models of tests/export: within 1e-5."""
MOST_LOST = 0.5
"""Of the distance between base and policy that an export in 16 bits may be away from the policy; beyond it more was lost than kept."""
ROWS = 64
"""Of logits at a time: 64 MiB with Gemma 3's vocabulary."""

Sequences = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
"""Token ids of prompts and of the replies to them."""


@dataclass(frozen=True)
class Likelihoods:
    """Of every token of the replies, in order; on the CPU."""

    logprobs: Float[Tensor, " T"]
    """Nats, at temperature 1."""
    likeliest: Int[Tensor, " T"]


@dataclass(frozen=True)
class Distance:
    """Two models on the same tokens."""

    tokens: int
    mean: float
    """Of |difference| of log-probabilities, in nats per token."""
    largest: float
    agreement: float
    """Share of places where both have the same likeliest token."""


@torch.inference_mode()
def likelihoods(model: Gemma, role: ModelRole, sequences: Sequences) -> Likelihoods:
    """What a role of the model makes of the replies; one sequence at a time, so that little memory is needed."""
    found = []
    with model.role(role):
        for prompt, reply in sequences:
            check()
            found.append(_of_one(model, pad_groups([prompt], [[reply]]).to(model.device)))
    return Likelihoods(torch.cat([logprobs for logprobs, _ in found]), torch.cat([best for _, best in found]))


def _of_one(model: Gemma, batch: GroupBatch) -> tuple[Tensor, Tensor]:
    layout = GroupLayout(batch)
    hidden = model.hidden_states(layout)[shifted(layout)]
    targets = batch.completion_ids[batch.completion_mask]
    logprobs, best = [], []
    for rows, wanted in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
        scores = model.logits(rows).log_softmax(-1)
        logprobs.append(scores.gather(-1, wanted[:, None])[:, 0].cpu())
        best.append(scores.argmax(-1).cpu())
    return torch.cat(logprobs), torch.cat(best)


def distance(one: Likelihoods, other: Likelihoods) -> Distance:
    """How far two models are apart. Raises FloatingPointError where one of them has no finite log-probability."""
    apart = (one.logprobs - other.logprobs).abs()
    if not torch.isfinite(apart).all():
        raise FloatingPointError("a log-probability of the export is not finite: weights are damaged, or too large for their dtype.")
    return Distance(len(apart), float(apart.mean()), float(apart.max()), float((one.likeliest == other.likeliest).float().mean()))


def why_not(exported: Distance, moved: Distance, *, exact: bool) -> str:
    """Why an export is not the policy, "" where it is.

    `exported`: from the policy to the export; `moved`: from the base to the policy. `exact` where stored and computed in float32.
    """
    if exact and (exported.largest > MAX_APART_FP32 or exported.agreement < 1):
        return f"in float32 it should be within {MAX_APART_FP32:g} nat of the policy everywhere, with the same likeliest tokens"
    if exported.mean > MOST_LOST * moved.mean:
        return (
            f"it is {exported.mean:.2g} nat per token away from the policy, and the base is {moved.mean:.2g}: "
            "more than half of what training did is lost"
        )
    return ""
