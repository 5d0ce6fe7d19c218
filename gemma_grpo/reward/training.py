"""Bradley-Terry training of a reward adapter on preference pairs, on the same log-odds that it will score with.

Owns the one epoch over the pairs, and what of it a checkpoint needs. What a verdict is, is generative.py's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from gemma_grpo import distributed
from gemma_grpo.config.schema import RewardModelSettings
from gemma_grpo.data.batch import GroupBatch
from gemma_grpo.data.prompts import EncodedPair
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.optimizer import AdapterOptimizer
from gemma_grpo.model.precision import LossScale

Progress = Callable[[int, int, float, float], None]
"""Called after each update with its number, the number of all, its loss and its share of pairs ranked right."""


@runtime_checkable
class PairScorer(Protocol):
    """What a training needs of whoever scores pairs: a judge's verdict (generative.py), or an implicit reward (implicit.py)."""

    model: Gemma

    def batch(self, pairs: Sequence[EncodedPair]) -> GroupBatch:
        """Each pair as a group of two, the chosen reply first."""
        ...

    def scores(self, piece: GroupBatch) -> Float[Tensor, "N 2"]:
        """Of the model's present role, with gradients where that is being trained."""
        ...


PairLoss = Callable[[Tensor], Tensor]
"""Scores of pairs, [N 2], to the mean of their losses."""


def bradley_terry_loss(rewards: Float[Tensor, "N 2"], *, centering: float = 0.0, label_smoothing: float = 0.0) -> Float[Tensor, ""]:
    """Mean over pairs of -log sigmoid(r_chosen - r_rejected) + centering (r_chosen + r_rejected)^2, in nats.

    label_smoothing is the assumed share of wrong labels. Sources: Bradley and Terry 1952; centring arXiv:2312.09244;
    smoothing arXiv:2305.18290's conservative form.
    """
    margin = rewards[:, 0] - rewards[:, 1]
    likelihood = (1 - label_smoothing) * logsigmoid(margin) + label_smoothing * logsigmoid(-margin)
    return (centering * rewards.sum(-1).square() - likelihood).mean()


class RewardTraining:
    """One epoch of Bradley-Terry over the pairs, in place on one adapter: AdamW, warm-up over a tenth, then linear to 0.

    Both sides of a pair are always in one batch, and their conversation is computed once. Between two updates `state` is all that is
    needed, beside the adapter, to go on exactly.
    """

    def __init__(
        self,
        scorer: PairScorer,
        pairs: Sequence[EncodedPair],
        settings: RewardModelSettings,
        *,
        seed: int,
        adapter: str = "reward",
        loss: PairLoss | None = None,
    ) -> None:
        self.scorer, self.settings, self.seed, self.adapter = scorer, settings, seed, adapter
        centering, smoothing = settings.centering, settings.label_smoothing
        self.loss: PairLoss = loss or partial(bradley_terry_loss, centering=centering, label_smoothing=smoothing)
        self.order = sorted(pairs, key=lambda item: hashlib.sha256(f"{seed}/{item.pair.pair_id}".encode()).digest())
        self.updates = -(-len(self.order) // settings.batch_size)
        self.made = 0
        """Updates made."""
        self.intact = True
        """Whether weights and optimizer are those after `made` updates."""
        self.optimizer = AdapterOptimizer(scorer.model.adapter_parameters(adapter), betas=(0.9, 0.99))
        self.scale = LossScale(scorer.model.dtype)

    def run(self, progress: Progress | None = None) -> None:
        """The updates that are left. Raises FloatingPointError on a loss or gradient that is not finite, before the update."""
        while self.made < self.updates:
            loss, rewards = self._update(self.made)
            self.made += 1
            if progress is not None:
                progress(self.made, self.updates, loss, (rewards[:, 0] > rewards[:, 1]).float().mean().item())

    def learning_rate(self, update: int) -> float:
        """Rate of the update with this number, from 0."""
        warmup = max(1, self.updates // 10)
        return self.settings.learning_rate * min((update + 1) / warmup, (self.updates - update) / max(1, self.updates - warmup))

    def _update(self, update: int) -> tuple[float, Float[Tensor, "N 2"]]:
        self.scale.relax()
        torch.manual_seed(self.seed * 1_000_003 + update)  # dropout, where it is on, is a function of (seed, update)
        batch = self.order[update * self.settings.batch_size : (update + 1) * self.settings.batch_size]
        gradient, loss, rewards = self._gradient(batch)
        if not math.isfinite(loss):
            raise FloatingPointError(f"reward adapter: the loss is {loss} at update {update + 1}. Lower reward_model.learning_rate.")
        norm = torch.nn.utils.get_total_norm(gradient)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"reward adapter: a gradient is not finite at update {update + 1}. Lower reward_model.learning_rate.")
        for tensor in gradient:
            tensor.mul_((1.0 / (norm + 1e-6)).clamp(max=1.0))
        self.intact = False
        self.optimizer.apply(gradient, self.learning_rate(update))
        broken = self.optimizer.not_finite()
        if broken is not None:
            raise FloatingPointError(f"reward adapter: update {update + 1} makes {broken} not finite. Lower reward_model.learning_rate.")
        self.intact = True
        return loss, rewards

    def _gradient(self, pairs: Sequence[EncodedPair]) -> tuple[list[Tensor], float, Float[Tensor, "N 2"]]:
        """Gradient of the mean loss over the pairs, that loss, and the pairs' rewards; the same however the token budget cuts them."""
        model, parameters = self.scorer.model, list(self.optimizer.parameters.values())
        gradient, loss, rewards = [torch.zeros_like(parameter) for parameter in parameters], 0.0, torch.zeros(len(pairs), 2)

        def work(piece: GroupBatch) -> tuple[Sequence[Tensor | None], Tensor, Tensor]:
            while True:
                scores = self.scorer.scores(piece)
                share = self.loss(scores) * (len(scores) / len(pairs))
                part = self.scale.gradient(share, parameters, 1 / len(pairs))
                if part is not None:
                    return part, share.detach(), scores.detach()

        batch = self.scorer.batch(pairs)
        with model.role(self.adapter, train=True):
            # whole groups: the two sides of a pair meet in one loss
            for slot, (part, share, scores) in model.budget.run(batch, work, doing="training the reward adapter", whole_groups=True):
                for total, value in zip(gradient, part, strict=True):
                    if value is not None:
                        total += value
                loss += share.item()
                slot.put(scores, rewards)
        loss_sum = torch.tensor(loss, dtype=torch.float64)
        distributed.sum_([*gradient, loss_sum, rewards], "training the reward adapter")
        return gradient, loss_sum.item(), rewards

    def state(self) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
        """Adam's moments by parameter name, and the numbers beside them."""
        return self.optimizer.state(), {"loss_scale": self.scale.state(), "memory": self.scorer.model.budget.state()}

    def load(self, made: int, tensors: Mapping[str, Tensor], controllers: Mapping[str, Mapping[str, float]]) -> None:
        """Continue after `made` updates from what state() gave."""
        self.made = made
        self.optimizer.load(tensors)
        self.scale.load(controllers["loss_scale"])
        self.scorer.model.budget.load(controllers["memory"])
