"""The generative reward: log-odds that Gemma answers "Yes" to "is this a good reply?", trained on preference pairs.

There is no head: the reward adapter starts from the model's own verdict, above chance, and scores a rollout's own tokens
followed by a fixed suffix. Training is Bradley-Terry on those same log-odds. Not here: quality figures (quality.py), and the judge
that is not trained (zero_shot.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from gemma_grpo.config.schema import RewardModelSettings
from gemma_grpo.data.batch import GroupBatch, pad_groups, pad_rollouts
from gemma_grpo.data.chat import encode_plain, judge_suffix_ids
from gemma_grpo.data.prompts import EncodedPair
from gemma_grpo.model.attention import GroupLayout
from gemma_grpo.model.gemma import Gemma, ModelRole
from gemma_grpo.model.precision import LossScale
from gemma_grpo.reward.base import Scores
from gemma_grpo.types import RolloutGroup

JUDGE_QUESTION = "Is this a good reply? Answer Yes or No."

Progress = Callable[[int, int, float, float], None]
"""Called with update, number of updates, loss and share of pairs ranked right."""


class Judge:
    """Reads verdicts: knows the question's tokens and the two answers' rows of the head."""

    def __init__(self, model: Gemma) -> None:
        self.model = model
        self.suffix = judge_suffix_ids(model.tokenizer, JUDGE_QUESTION)
        self.yes, self.no = (_first_token(model, answer) for answer in ("Yes", "No"))

    def log_odds(self, batch: GroupBatch) -> Float[Tensor, "N G"]:
        """logit(Yes) - logit(No) after the last token of each completion, which ends with the suffix; of the model's present role."""
        layout = GroupLayout(batch)
        return self.verdicts(layout, self.model.hidden_states(layout))

    def verdicts(self, layout: GroupLayout, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "N G"]:
        """The same from a layout's hidden states."""
        last = layout.last_completion_index  # (N, G)
        head = self.model.head_weight
        # two rows of the head instead of 262,144; their difference is taken in float32
        direction = head[self.yes].detach().float() - head[self.no].detach().float()
        return (hidden[last.flatten()].float() @ direction).view(last.shape)


class GenerativeReward:
    """Scores rollouts by the judge's log-odds with the trained reward adapter."""

    name = "generative"

    def __init__(self, model: Gemma) -> None:
        self.judge = Judge(model)

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        """Log-odds of each completion, [N][G]. A completion cut by the length limit is judged as it is, unfinished."""
        return scores_by_size(groups, lambda part: _verdicts(self.judge, pad_rollouts(part, self.judge.suffix), "reward"))


def scores_by_size(groups: Sequence[RolloutGroup], read: Callable[[Sequence[RolloutGroup]], Float[Tensor, "N G"]]) -> Scores:
    """Scores of groups that need not be of one size; those of one size are read together."""
    sizes = [len(group.completions) for group in groups]
    scores: Scores = [[] for _ in groups]
    for size in sorted(set(sizes)):
        places = [n for n, other in enumerate(sizes) if other == size]
        for n, row in zip(places, read([groups[n] for n in places]).tolist(), strict=True):
            scores[n] = row
    return scores


def score_pairs(judge: Judge, pairs: Sequence[EncodedPair], role: ModelRole) -> Float[Tensor, "N 2"]:
    """Log-odds of the chosen and the rejected reply of each pair."""
    return _verdicts(judge, _pair_batch(judge, pairs), role) if pairs else torch.zeros(0, 2)


@torch.no_grad()
def _verdicts(judge: Judge, batch: GroupBatch, role: ModelRole) -> Float[Tensor, "N G"]:
    """Log-odds under a role, as many at a time as the model's token budget allows."""
    model, verdicts = judge.model, torch.zeros(batch.completion_ids.shape[:2])
    with model.role(role):
        for slot, log_odds in model.budget.run(batch.to(model.device), judge.log_odds, doing="judging"):
            slot.put(log_odds, verdicts)
    return verdicts


def bradley_terry_loss(rewards: Float[Tensor, "N 2"], *, centering: float = 0.0, label_smoothing: float = 0.0) -> Float[Tensor, ""]:
    """Mean over pairs of -log sigmoid(r_chosen - r_rejected) + centering (r_chosen + r_rejected)^2, in nats.

    label_smoothing is the assumed share of wrong labels. Sources: Bradley and Terry 1952; centring arXiv:2312.09244;
    smoothing arXiv:2305.18290's conservative form.
    """
    margin = rewards[:, 0] - rewards[:, 1]
    likelihood = (1 - label_smoothing) * logsigmoid(margin) + label_smoothing * logsigmoid(-margin)
    return (centering * rewards.sum(-1).square() - likelihood).mean()


def train_reward_adapter(
    judge: Judge, pairs: Sequence[EncodedPair], settings: RewardModelSettings, *, seed: int, progress: Progress | None = None
) -> None:
    """One epoch of Bradley-Terry over the pairs, in place on the "reward" adapter: AdamW, warm-up over a tenth, then linear to 0.

    Both sides of a pair are always in one batch, and their conversation is computed once. Raises FloatingPointError on a
    loss or gradient that is not finite, before the update.
    """
    order = sorted(pairs, key=lambda item: hashlib.sha256(f"{seed}/{item.pair.pair_id}".encode()).digest())
    updates = -(-len(order) // settings.batch_size)
    parameters = list(judge.model.adapter_parameters("reward").values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    warmup, scale = max(1, updates // 10), LossScale(judge.model.dtype)
    torch.manual_seed(seed)  # dropout, where it is on, is part of the run
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda u: min((u + 1) / warmup, (updates - u) / max(1, updates - warmup)))
    for update in range(updates):
        scale.relax()
        batch = order[update * settings.batch_size : (update + 1) * settings.batch_size]
        gradient, loss, rewards = _pair_gradient(judge, batch, settings, parameters, scale)
        if not math.isfinite(loss):
            raise FloatingPointError(f"reward adapter: the loss is {loss} at update {update + 1}. Lower reward_model.learning_rate.")
        for parameter, value in zip(parameters, gradient, strict=True):
            parameter.grad = value
        if not torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, 1.0)):
            raise FloatingPointError(f"reward adapter: a gradient is not finite at update {update + 1}. Lower reward_model.learning_rate.")
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if progress is not None:
            progress(update + 1, updates, loss, (rewards[:, 0] > rewards[:, 1]).float().mean().item())


def _pair_gradient(
    judge: Judge, pairs: Sequence[EncodedPair], settings: RewardModelSettings, parameters: Sequence[Tensor], scale: LossScale
) -> tuple[list[Tensor], float, Float[Tensor, "N 2"]]:
    """Gradient of the mean loss over the pairs, that loss, and the pairs' rewards; the same however the token budget cuts them."""
    gradient, loss, rewards = [torch.zeros_like(parameter) for parameter in parameters], 0.0, torch.zeros(len(pairs), 2)

    def work(piece: GroupBatch) -> tuple[Sequence[Tensor | None], Tensor, Tensor]:
        while True:
            log_odds = judge.log_odds(piece)
            mean = bradley_terry_loss(log_odds, centering=settings.centering, label_smoothing=settings.label_smoothing)
            share = mean * (len(log_odds) / len(pairs))
            part = scale.gradient(share, parameters, 1 / len(pairs))
            if part is not None:
                return part, share.detach(), log_odds.detach()

    batch = _pair_batch(judge, pairs)
    with judge.model.role("reward", train=True):
        # whole groups: the two sides of a pair meet in one loss
        for slot, (part, share, log_odds) in judge.model.budget.run(batch, work, doing="training the reward adapter", whole_groups=True):
            for total, value in zip(gradient, part, strict=True):
                if value is not None:
                    total += value
            loss += share.item()
            slot.put(log_odds, rewards)
    return gradient, loss, rewards


def _pair_batch(judge: Judge, pairs: Sequence[EncodedPair]) -> GroupBatch:
    replies = [[(*reply, *judge.suffix) for reply in (pair.chosen_ids, pair.rejected_ids)] for pair in pairs]
    return pad_groups([pair.prompt_ids for pair in pairs], replies).to(judge.model.device)


def _first_token(model: Gemma, answer: str) -> int:
    return encode_plain(model.tokenizer, answer)[0]
