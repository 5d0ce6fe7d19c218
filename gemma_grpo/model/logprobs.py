"""Log-probabilities and entropy of completion tokens: chunked over tokens, the head frozen. Owns the only shift by one.

A 262,144-word vocabulary costs 1 MiB of float32 logits per token: they exist for one chunk at a time, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemma_grpo.data.batch import GroupBatch
from gemma_grpo.model.attention import GroupLayout
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.precision import float32_logits, head_gradient

CHUNK_TOKENS = 256


def completion_logprobs(
    model: Gemma, batch: GroupBatch, *, temperature: float = 1.0
) -> tuple[Float[Tensor, "N G C"], Float[Tensor, "N G C"]]:
    """Log-probability of each completion token and entropy of the distribution it was drawn from, in nats, float32; 0 on padding.

    Of the model's present role, at logits / temperature; gradients flow to the adapter where that role is being trained.
    """
    layout = GroupLayout(batch)
    hidden = model.hidden_states(layout)
    mask = batch.completion_mask
    sources, targets = shifted(layout), batch.completion_ids[mask]
    logprobs, entropy = token_logprobs(hidden[sources], model.head_weight, targets, temperature)
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
    hidden: Float[Tensor, "T D"], head_weight: Float[Tensor, "V D"], targets: Int[Tensor, " T"], temperature: float = 1.0
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """log softmax(hidden @ head.T / temperature)[target] and the entropy of that softmax; no gradient for the head."""
    logprobs, entropy = _SelectedLogprobs.apply(hidden, head_weight.detach(), targets, temperature)  # type: ignore[no-untyped-call]
    return logprobs, entropy


class _SelectedLogprobs(torch.autograd.Function):
    """Saves hidden states, log-sum-exp and entropy; each chunk's logits are made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logprobs, entropies, normalisers = [], [], []
        for start in range(0, len(hidden), CHUNK_TOKENS):
            piece = slice(start, start + CHUNK_TOKENS)
            # in place, here and below: each copy of a chunk is 256 MiB, and two are there at once
            logp = float32_logits(hidden[piece], head_weight).div_(temperature)
            normaliser = logp.logsumexp(-1)
            logp.sub_(normaliser[:, None])
            logprobs.append(logp.gather(-1, targets[piece, None])[:, 0])
            entropies.append(-logp.exp().mul_(logp).sum(-1))
            normalisers.append(normaliser)
            del logp  # before the next chunk's logits are made
        empty = hidden.new_zeros(0, dtype=torch.float32)
        entropy, normaliser = torch.cat([empty, *entropies]), torch.cat([empty, *normalisers])
        ctx.save_for_backward(hidden, head_weight, targets, normaliser, entropy)
        ctx.temperature = temperature
        return torch.cat([empty, *logprobs]), entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """d logp / d logits = onehot - p;  d H / d logits = -p (log p + H)."""
        logprob_grad, entropy_grad = grads
        hidden, head_weight, targets, normaliser, entropy = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden)
        for start in range(0, len(hidden), CHUNK_TOKENS):
            piece = slice(start, start + CHUNK_TOKENS)
            logp = float32_logits(hidden[piece], head_weight).div_(ctx.temperature).sub_(normaliser[piece, None])
            p = logp.exp()
            logits_grad = logp.add_(entropy[piece, None]).mul_(entropy_grad[piece, None]).add_(logprob_grad[piece, None]).mul_(p).neg_()
            del p, logp
            logits_grad.scatter_add_(-1, targets[piece, None], logprob_grad[piece, None])
            hidden_grad[piece] = head_gradient(logits_grad.div_(ctx.temperature), head_weight).to(hidden.dtype)
            del logits_grad
        return hidden_grad, None, None, None
