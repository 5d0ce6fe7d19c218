"""Counter-based randomness: (run seed, step, prompt, completion, position) -> one uniform number -> one token.

No generator has a state, so there is none to save, and a completion is the same whatever batch it was sampled in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64  # its multipliers, as signed integers
_MIX_2 = 0x94D049BB133111EB - 2**64


def row_keys(seed: int, step: int, prompt_ids: Sequence[str], num_generations: int) -> Int[Tensor, " B"]:
    """One 64-bit key for each completion of each prompt, in prompt order."""
    keys = [_key(seed, step, prompt_id, index) for prompt_id in prompt_ids for index in range(num_generations)]
    return torch.tensor(keys, dtype=torch.int64)


def uniforms(keys: Int[Tensor, " B"], position: int) -> Float[Tensor, " B"]:
    """One number in [0, 1) for each row at this completion position, float64.

    Source: splitmix64, Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195; int64 products wrap as uint64's do.
    """
    z = keys + _signed(_GOLDEN * (position + 1))
    z = (z ^ _shifted_right(z, 30)) * _MIX_1
    z = (z ^ _shifted_right(z, 27)) * _MIX_2
    z = z ^ _shifted_right(z, 31)
    return _shifted_right(z, 11).double() * 2.0**-53


def sampling_logprobs(
    logits: Float[Tensor, "B V"], *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Float[Tensor, "B V"]:
    """Log-probabilities of the distribution that is actually sampled: temperature first, then top-k, then top-p, renormalised."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    if top_k:
        kept = logprobs.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < kept, -torch.inf).log_softmax(-1)
    if top_p < 1:
        ranked, order = logprobs.sort(descending=True, stable=True)
        mass_before = ranked.exp().cumsum(-1) - ranked.exp()
        outside = torch.zeros_like(mass_before, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
        logprobs = logprobs.masked_fill(outside, -torch.inf).log_softmax(-1)
    return logprobs


def draw(logprobs: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token at which the cumulative probability first exceeds each uniform number."""
    # float64: in float32 the sum over 262,144 tokens is off by more than the rarest of them
    cumulative = logprobs.double().exp().cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logprobs.shape[-1] - 1)


def _key(seed: int, step: int, prompt_id: str, index: int) -> int:
    digest = hashlib.sha256(f"{seed}/{step}/{prompt_id}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def _shifted_right(z: Tensor, bits: int) -> Tensor:
    # torch shifts signed integers arithmetically; splitmix64 wants zeros from the left
    return (z >> bits) & ((1 << (64 - bits)) - 1)
