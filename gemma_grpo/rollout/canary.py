"""The canary: a replica's log-probabilities of a few tokens beside the learner's own, before anything it samples is learned from.

An adapter that is not applied, temperature left out, another base: none of it fails, all of it shows here. Owns the comparison and its
limits; when it is made is vllm.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gemma_grpo.data.batch import GroupBatch, pad_groups, pad_values
from gemma_grpo.model.gemma import REFERENCE, Gemma, ModelRole
from gemma_grpo.model.logprobs import completion_logprobs
from gemma_grpo.rollout.wire import Sampled
from gemma_grpo.types import Prompt

PROMPTS = 2
"""Of a batch that are asked."""
MEASURABLE = 1e-3
"""Nats a token between policy and base from which it can be said whose log-probabilities a replica gives: well above float32's rounding."""
MUCH_NEARER = 4.0
"""How many times nearer to the base than to the policy no rounding comes by chance, over 2 x 16 tokens that are that far apart."""


@dataclass(frozen=True, slots=True)
class Gaps:
    """Means of |difference| of log-probabilities over a canary's tokens, in nats."""

    policy: float
    """Replica to learner."""
    base: float
    """Replica to the untouched base."""
    apart: float
    """Learner to the untouched base."""

    def fault(self, role: ModelRole, tolerance: float, temperature: float) -> str | None:
        """What is wrong, as the rest of a sentence, and what to do; None where they agree."""
        if role != REFERENCE and self.apart > MEASURABLE and self.base * MUCH_NEARER < self.policy:
            return (
                f"does not apply the adapter: its log-probabilities are {self.policy:.4f} nats from the policy's and {self.base:.4f} from "
                f"the untouched base's, which are {self.apart:.4f} apart (mean over the canary's tokens). Start it with --enable-lora, "
                "--max-lora-rank of at least lora.r and a version that applies LoRA to Gemma 3 text models."
            )
        if not self.policy <= tolerance:
            processed = "" if temperature == 1 else f", --logprobs-mode processed_logprobs (temperature is {temperature:g})"
            return (
                f"disagrees with the learner: their log-probabilities are {self.policy:.4f} nats apart (mean over the canary's tokens), "
                f"serving.tolerance is {tolerance:g}. Start it with the same base, revision and dtype{processed}, and "
                "--generation-config vllm; raise serving.tolerance only for a rounding that you know."
            )
        return None


@torch.inference_mode()
def gaps(model: Gemma, role: ModelRole, prompts: Sequence[Prompt], found: Sequence[Sequence[Sampled]], *, temperature: float) -> list[Gaps]:
    """Of each replica, whose answers `found` has: one completion of each prompt. One pass as the role and one as the base for all."""
    by_prompt = list(zip(*found, strict=True))
    batch = pad_groups([prompt.token_ids for prompt in prompts], [[one.token_ids for one in group] for group in by_prompt])
    replica = pad_values([[one.logprobs for one in group] for group in by_prompt], batch)
    policy, base = (_logprobs(model, one, batch, temperature) for one in (role, REFERENCE))
    means = [_mean_gap(*pair, batch) for pair in ((replica, policy), (replica, base), (policy, base))]
    return [Gaps(*(mean[number] for mean in means)) for number in range(len(found))]


def _logprobs(model: Gemma, role: ModelRole, batch: GroupBatch, temperature: float) -> Float[Tensor, "N R C"]:
    with model.role(role):
        return completion_logprobs(model, batch.to(model.device), temperature=temperature)[0].cpu()


def _mean_gap(one: Float[Tensor, "N R C"], other: Float[Tensor, "N R C"], batch: GroupBatch) -> list[float]:
    """By replica, which is the axis that groups have."""
    gap = (one - other).abs().masked_fill(~batch.completion_mask, 0.0).sum((0, 2))
    means: list[float] = (gap / batch.completion_mask.sum((0, 2))).tolist()
    return means
