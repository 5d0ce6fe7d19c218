"""Counter-based randomness: (run seed, step, prompt, completion, position) -> one uniform number -> one token.

No generator has a state, so there is none to save, and a completion is the same whatever batch it was sampled in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 512
"""Words whose probabilities are summed together first: about the square root of Gemma's vocabulary."""
_BELOW_ONE = 1 - 2.0**-53
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64  # its multipliers, as signed integers
_MIX_2 = 0x94D049BB133111EB - 2**64


def row_keys(seed: int, step: int, prompt_ids: Sequence[str], num_generations: int) -> Int[Tensor, " B"]:
    """One 64-bit key for each completion of each prompt, in prompt order."""
    keys = [_key(seed, step, prompt_id, index) for prompt_id in prompt_ids for index in range(num_generations)]
    return torch.tensor(keys, dtype=torch.int64)


def uniforms(keys: Int[Tensor, " B"], position: int | Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """One number in [0, 1) for each row at its completion position, float64.

    Source: splitmix64, Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195; int64 products wrap as uint64's do.
    """
    z = keys + (torch.as_tensor(position, device=keys.device) + 1) * _signed(_GOLDEN)
    z = (z ^ _shifted_right(z, 30)) * _MIX_1
    z = (z ^ _shifted_right(z, 27)) * _MIX_2
    z = z ^ _shifted_right(z, 31)
    return _shifted_right(z, 11).double() * 2.0**-53


def filtered(logits: Float[Tensor, "B V"], *, top_k: int = 0, top_p: float = 1.0) -> Float[Tensor, "B V"]:
    """-inf where a token is not among the top_k likeliest, then not among the likeliest that together have top_p of the mass left."""
    if top_k:
        kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kept, -torch.inf)
    if top_p < 1:
        ranked, order = logits.softmax(-1).sort(descending=True, stable=True)
        outside = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, order, ranked.cumsum(-1) - ranked >= top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def draw(logits: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """One token of softmax(logits) for each row and its log-probability: where the cumulative probability first exceeds a uniform number.

    The sum over the vocabulary is searched in two levels, blocks and then inside one: each number is read once. NaN where a row's logits
    are not finite enough to have a distribution.
    """
    peak = logits.amax(-1, keepdim=True)
    mass = (logits - peak).exp_()
    # float64: in float32 the sum over 262,144 tokens is off by more than the rarest of them
    blocks = _block_sums(mass).double()
    cumulative = blocks.cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    block = _first_above(cumulative, threshold)
    inside = _block_of(mass, block).double().cumsum(-1)
    # a block's float32 sum is rounded: what is left is rescaled to the block's exact one, or its last token would take the difference
    left = (threshold - cumulative.gather(-1, block)) / blocks.gather(-1, block) + 1
    token = (block * BLOCK + _first_above(inside, left * inside[:, -1:])).clamp(max=logits.shape[-1] - 1)
    logprobs = (logits.gather(-1, token) - peak).double() - cumulative[:, -1:].log()
    return token[:, 0], logprobs[:, 0].float()


def _block_sums(mass: Float[Tensor, "B V"]) -> Float[Tensor, "B N"]:
    whole = mass.shape[-1] // BLOCK * BLOCK
    sums = mass[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1) if whole else mass[:, :0]
    return sums if whole == mass.shape[-1] else torch.cat([sums, mass[:, whole:].sum(-1, keepdim=True)], -1)


def _block_of(mass: Float[Tensor, "B V"], block: Int[Tensor, "B 1"]) -> Float[Tensor, "B S"]:
    """The numbers of one block for each row, 0 past the vocabulary's end."""
    places = block * BLOCK + torch.arange(BLOCK, device=mass.device)
    return mass.gather(-1, places.clamp(max=mass.shape[-1] - 1)) * (places < mass.shape[-1])


def _first_above(cumulative: Float[Tensor, "B N"], threshold: Float[Tensor, "B 1"]) -> Int[Tensor, "B 1"]:
    # below the total, rounding or not: the first place that reaches it holds a positive number, those behind may not
    below = torch.minimum(threshold, cumulative[:, -1:] * _BELOW_ONE)
    return torch.searchsorted(cumulative, below, right=True).clamp(max=cumulative.shape[-1] - 1)


def _key(seed: int, step: int, prompt_id: str, index: int) -> int:
    digest = hashlib.sha256(f"{seed}/{step}/{prompt_id}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def _shifted_right(z: Tensor, bits: int) -> Tensor:
    # torch shifts signed integers arithmetically; splitmix64 wants zeros from the left
    return (z >> bits) & ((1 << (64 - bits)) - 1)
