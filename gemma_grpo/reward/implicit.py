"""Direct preference optimisation: beta (log pi - log pi_ref) of a reply, learned on pairs as a judge is (arXiv:2305.18290).

The Bradley-Terry loss of this implicit reward *is* DPO's, so the training of judges makes a policy to be compared with. Beside it the
plainest policy of all, likelihood of the preferred replies (SFT). Owns what a pair's score is, and a rollout's; the loop is training.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gemma_grpo import distributed
from gemma_grpo.data.batch import GroupBatch, pad_groups, pad_rollouts
from gemma_grpo.data.prompts import EncodedPair
from gemma_grpo.model.gemma import REFERENCE, Gemma, ModelRole
from gemma_grpo.model.logprobs import completion_logprobs
from gemma_grpo.reward.base import Scores
from gemma_grpo.reward.generative import scores_by_size
from gemma_grpo.types import RolloutGroup


@dataclass(frozen=True)
class ReferredBatch(GroupBatch):
    """Pairs with what the reference says of them."""

    ref_sums: Float[Tensor, "N G"]


class ImplicitScorer:
    """Scores pairs for DPO: beta times how much likelier each reply is than under the untouched model, in nats."""

    def __init__(self, model: Gemma, beta: float) -> None:
        self.model, self.beta = model, beta

    def batch(self, pairs: Sequence[EncodedPair]) -> ReferredBatch:
        """Each pair as a group of two, the chosen reply first; the reference reads them once."""
        plain = _replies(pairs).to(self.model.device)
        return ReferredBatch(**vars(plain), ref_sums=sequence_logprobs(self.model, plain, REFERENCE).to(self.model.device))

    def scores(self, piece: GroupBatch) -> Float[Tensor, "N 2"]:
        """Of the model's present role."""
        assert isinstance(piece, ReferredBatch)
        logprobs, _ = completion_logprobs(self.model, piece, entropy_gradient=False)
        return self.beta * (logprobs.sum(-1) - piece.ref_sums)


class ImplicitReward:
    """Scores rollouts by what a DPO adapter makes likelier: an ensemble's member of another kind than a judge (arXiv:2305.18290).

    It grows with a reply's length where the policy moved, and reaches less far than a judge does (RewardBench): no reward of its own.
    """

    name = "implicit"

    def __init__(self, model: Gemma, adapter: str, beta: float) -> None:
        self.model, self.adapter, self.beta = model, adapter, beta

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        """beta (log pi - log pi_ref) of each completion, in nats, [N][G]."""
        return scores_by_size(groups, self._read)

    def _read(self, part: Sequence[RolloutGroup]) -> Float[Tensor, "N G"]:
        batch = pad_rollouts(part).to(self.model.device)
        return self.beta * (sequence_logprobs(self.model, batch, self.adapter) - sequence_logprobs(self.model, batch, REFERENCE))


class LikelihoodScorer:
    """Scores pairs for SFT: mean log-probability of each reply's tokens."""

    def __init__(self, model: Gemma) -> None:
        self.model = model

    def batch(self, pairs: Sequence[EncodedPair]) -> GroupBatch:
        """Each pair as a group of two, the chosen reply first."""
        return _replies(pairs).to(self.model.device)

    def scores(self, piece: GroupBatch) -> Float[Tensor, "N 2"]:
        """Of the model's present role."""
        logprobs, _ = completion_logprobs(self.model, piece, entropy_gradient=False)
        return logprobs.sum(-1) / piece.completion_mask.sum(-1)


def likelihood_loss(scores: Float[Tensor, "N 2"]) -> Float[Tensor, ""]:
    """-mean log-probability per token of the preferred replies, in nats; the others count for nothing."""
    return -scores[:, 0].mean()


@torch.no_grad()
def sequence_logprobs(model: Gemma, batch: GroupBatch, role: ModelRole) -> Float[Tensor, "N G"]:
    """Sum over each completion's tokens, in nats, as many at a time as the model's token budget allows."""
    sums = torch.zeros(batch.completion_ids.shape[:2])

    def read(piece: GroupBatch) -> Tensor:
        return completion_logprobs(model, piece)[0].sum(-1)

    with model.role(role):
        for slot, values in model.budget.run(batch, read, doing=f"scoring with {role}"):
            slot.put(values, sums)
    distributed.sum_([sums], f"scoring with {role}")
    return sums


def _replies(pairs: Sequence[EncodedPair]) -> GroupBatch:
    return pad_groups([pair.prompt_ids for pair in pairs], [[pair.chosen_ids, pair.rejected_ids] for pair in pairs])
