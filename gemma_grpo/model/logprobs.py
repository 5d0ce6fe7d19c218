"""Log-probabilities and entropy of completion tokens: in tiles of the vocabulary, the head frozen. Owns the only shift by one.

A 262,144-word vocabulary costs 1 MiB of float32 logits per token: they exist for one tile at a time. The head being frozen, what a
backward pass needs of a token is one vector, d logp / d hidden, and it is found in the same pass: the tiles are made once, not twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemma_grpo.data.batch import GroupBatch
from gemma_grpo.model.attention import GroupLayout
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.precision import float32_product
from gemma_grpo.stopping import check

TILE = {"cpu": (256, 8192), "cuda": (1024, 16384)}
"""Tokens and words of the logits that exist at a time, in three copies: on a CPU they stay in its cache."""


def completion_logprobs(
    model: Gemma, batch: GroupBatch, *, temperature: float = 1.0, entropy_gradient: bool = True
) -> tuple[Float[Tensor, "N G C"], Float[Tensor, "N G C"]]:
    """Log-probability of each completion token and entropy of the distribution it was drawn from, in nats, float32; 0 on padding.

    Of the model's present role, at logits / temperature; gradients flow to the adapter where that role is being trained.
    """
    layout = GroupLayout(batch)
    hidden = model.hidden_states(layout)
    mask = batch.completion_mask
    sources, targets = shifted(layout), batch.completion_ids[mask]
    logprobs, entropy = token_logprobs(hidden[sources], model.head_weight, targets, temperature, entropy_gradient=entropy_gradient)
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy)


def shifted(layout: GroupLayout) -> Int[Tensor, " T"]:
    """Packed index of the hidden state that predicts each completion token: the token before it, first of all the prompt's last.

    prompt [p0 p1 p2], completion [a b c]:  a <- p2,  b <- a,  c <- b
    """
    mask = layout.batch.completion_mask
    is_first = mask.long().cumsum(-1) == 1
    return torch.where(is_first, layout.last_prompt_index[:, None, None], layout.completion_index - 1)[mask]


def token_logprobs(
    hidden: Float[Tensor, "T D"],
    head_weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " T"],
    temperature: float = 1.0,
    *,
    entropy_gradient: bool = True,
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """log softmax(hidden @ head.T / temperature)[target] and the entropy of that softmax, in nats; no gradient for the head.

    Without entropy_gradient the entropy is a number alone: it costs a third of the backward work, and is seldom part of a loss.
    """
    wanted = (bool(hidden.requires_grad and torch.is_grad_enabled()), entropy_gradient)
    logprobs, entropy = _SelectedLogprobs.apply(hidden, head_weight.detach(), targets, temperature, *wanted)  # type: ignore[no-untyped-call]
    return logprobs, entropy


class _SelectedLogprobs(torch.autograd.Function):
    """One pass over the vocabulary, for the values and for how they change with the hidden states: the backward pass only scales."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head_weight: Tensor, targets: Tensor, temperature: float, gradient: bool, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        tokens, _ = TILE["cuda" if hidden.is_cuda else "cpu"]
        logprobs, entropy = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
        slopes = hidden.new_empty((gradient * (1 + entropy_gradient), *hidden.shape), dtype=torch.float32)
        for start in range(0, len(hidden), tokens):
            check()
            piece = slice(start, start + tokens)
            sums = _Sums(hidden[piece], targets[piece], len(slopes))
            for words in _tiles(head_weight):
                sums.add(words, head_weight[words], temperature)
            logprobs[piece], entropy[piece] = sums.logprobs(), sums.entropy()
            for slope, change in zip(slopes, sums.slopes(head_weight, temperature), strict=True):
                slope[piece] = change
        ctx.save_for_backward(slopes)
        ctx.dtype = hidden.dtype
        if gradient and not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Of each token: its two gradients times the two slopes."""
        (slopes,) = ctx.saved_tensors
        hidden_grad = grads[0][:, None] * slopes[0]
        if len(slopes) == 2:
            hidden_grad.addcmul_(grads[1][:, None], slopes[1])
        return hidden_grad.to(ctx.dtype), None, None, None, None, None


def _tiles(head_weight: Float[Tensor, "V D"]) -> Iterator[slice]:
    _, words = TILE["cuda" if head_weight.is_cuda else "cpu"]
    return (slice(start, start + words) for start in range(0, len(head_weight), words))


class _Sums:
    """Running sums over the vocabulary for a few tokens, relative to the largest logit so far (as in online softmax, arXiv:1805.02867).

    With e = exp(logit - peak): total = sum e, moment = sum e (logit - peak), and for slopes sum e head and sum e (logit - peak) head.
    """

    def __init__(self, hidden: Float[Tensor, "t D"], targets: Int[Tensor, " t"], num_slopes: int) -> None:
        self.hidden, self.targets = hidden, targets
        # a number, not infinity: 0 times it is 0
        self.peak = torch.full((len(hidden),), -1e30, device=hidden.device)
        self.total, self.moment, self.picked = (torch.zeros_like(self.peak) for _ in range(3))
        self.heads = [torch.zeros(hidden.shape, device=hidden.device) for _ in range(num_slopes)]

    def add(self, words: slice, head: Float[Tensor, "v D"], temperature: float) -> None:
        """One tile of the vocabulary."""
        logits = float32_product(self.hidden, head.T)
        if temperature != 1.0:
            logits /= temperature
        self._pick(words, logits)
        peak = torch.maximum(self.peak, logits.amax(-1))
        self._move(peak)
        logits -= peak[:, None]
        mass = logits.exp()
        self.total += mass.sum(-1)
        logits *= mass
        self.moment += logits.sum(-1)
        for total, weights in zip(self.heads, (mass, logits), strict=False):
            total += float32_product(weights.to(head.dtype), head)

    def _pick(self, words: slice, logits: Float[Tensor, "t v"]) -> None:
        place = self.targets - words.start
        inside = (place >= 0) & (place < logits.shape[-1])
        self.picked = torch.where(inside, logits.gather(-1, (place * inside)[:, None])[:, 0], self.picked)

    def _move(self, peak: Float[Tensor, " t"]) -> None:
        """Make all sums relative to a higher peak."""
        step = self.peak - peak
        shrink = step.exp()
        if len(self.heads) == 2:
            self.heads[1].addcmul_(self.heads[0], step[:, None]).mul_(shrink[:, None])
        if self.heads:
            self.heads[0] *= shrink[:, None]
        self.moment = (self.moment + step * self.total) * shrink
        self.total, self.peak = self.total * shrink, peak

    def logprobs(self) -> Float[Tensor, " t"]:
        """Of the targets."""
        return self.picked - self.peak - self.total.log()

    def entropy(self) -> Float[Tensor, " t"]:
        """log sum - mean logit, both relative to the peak."""
        return self.total.log() - self.moment / self.total

    def slopes(self, head_weight: Float[Tensor, "V D"], temperature: float) -> list[Tensor]:
        """With p = e / total:  d logp / d hidden = (head[target] - sum p head) / temperature,
        d entropy / d hidden = (mean sum p head - sum p (logit - peak) head) / temperature, mean = sum p (logit - peak)."""
        if not self.heads:
            return []
        means = [total.div_(self.total[:, None]) for total in self.heads]
        entropy = [(self.moment / self.total)[:, None] * means[0] - second for second in means[1:]]
        return [slope / temperature for slope in (head_weight[self.targets].float() - means[0], *entropy)]
