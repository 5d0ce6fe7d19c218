"""Attention of packed groups as matrix products: a prompt's keys are read by all its completions at once, and are never copied for them.

A block is some queries of one prompt's group (or of the prompt itself): they share the keys before them, and each sequence has its own.
Scores exist for one block at a time, forward and backward; nothing is kept but what went in. Masks come from *positions*, of real
tokens only: causality hides a rectangle's padding, so there is none to mask. Owns these products, not who makes up a group (attention.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gemma_grpo.model.precision import float32_product

BLOCK_SCORES = {"cpu": 2**21, "cuda": 2**26}
"""Scores of one block, all heads: float32 of them and three more copies live at a time (on a CPU they should stay in its cache)."""
TOGETHER = 2**14
"""Scores of a head up to which several prompts, or groups, share a block: so few cost less than starting another one, padded or not."""


def within_window(query_positions: Int[Tensor, "*b Q"], key_positions: Int[Tensor, "*b K"], window: int | None) -> Bool[Tensor, "*b Q K"]:
    """Causal, and no further back than the window, which counts the token itself (transformers: key > query - window)."""
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


@dataclass(frozen=True)
class Sequences:
    """Sequences of a packed row, in one or more families of as many each that follow `before` tokens of their own."""

    before: int
    families: tuple[int, ...]
    """Packed index of the first token before each family."""
    starts: tuple[int, ...]
    """Packed index of each sequence's first token, family after family."""
    lengths: tuple[int, ...]

    def rows(self, first: int, last: int) -> tuple[Int[Tensor, "S W"], Bool[Tensor, "S W"]]:
        """Packed index of tokens `first` to `last` of each in a rectangle, and which of its places are real; on the host."""
        columns = torch.arange(first, last)
        return torch.tensor(self.starts)[:, None] + columns, columns < torch.tensor(self.lengths)[:, None]

    def follow(self, first: int, last: int) -> bool:
        """Whether the real tokens of that rectangle fill it and stand one after the other."""
        return min(self.lengths) >= last and all(after - start == last - first for start, after in pairwise(self.starts))


Masks = dict[tuple[int, ...], Tensor]
"""Blocks with as many keys and queries in the same places share a mask."""


class Block:
    """Some queries of each of some sequences. Keys: the shared ones before the sequences, and each one's own so far."""

    def __init__(self, sequences: Sequences, queries: slice, window: int | None, device: torch.device, masks: Masks) -> None:
        first, last = queries.start, queries.stop
        reach = 0 if window is None else window - 1
        oldest = 0 if window is None else max(0, sequences.before + first - reach)
        own = 0 if window is None else max(0, first - reach)  # the first own key that any of these queries sees
        self.width = max(0, sequences.before - oldest)
        self.shape = (len(sequences.lengths), last - first)
        prompts = Sequences(0, (), sequences.families, (sequences.before,) * len(sequences.families))
        self.shared = _Rows(prompts, sequences.before - self.width, sequences.before, device)
        self.queries, self.own = (_Rows(sequences, column, last, device) for column in (first, own))
        place = (sequences.before, self.width, first, last, own)
        if place not in masks:
            masks[place] = _bias(*place, window, device)
        self.mask = masks[place]

    def scores(self, query: Float[Tensor, "K SQR D"], shared: Tensor, own: Tensor, rest: float) -> Float[Tensor, "K SQR P"]:
        """Masked scores, float32; query already carries the power of two in the scaling."""
        parts = [by_part(query, shared.transpose(1, 2)), by_part(query, own.transpose(1, 2))]
        scores = torch.cat(parts, -1)
        if rest != 1.0:
            scores *= rest
        # [K, S, Q, R, keys]: one mask for all heads and sequences
        scores.view(len(query), self.shape[0], self.shape[1], -1, scores.shape[-1]).add_(self.mask[:, None])
        return scores

    def read(self, weights: Float[Tensor, "K SQR P"], shared: Tensor, own: Tensor) -> Float[Tensor, "K SQR D"]:
        """Weighted sums over both parts, float32."""
        return by_part(weights[..., : self.width], shared).add_(by_part(weights[..., self.width :], own))

    def spread(self, weights: Float[Tensor, "K SQR P"], rows: Float[Tensor, "K SQR D"]) -> tuple[Tensor, Tensor]:
        """The transpose of `read`: what each key receives, shared [KF P D] and own [KS Y D]."""
        parts = ((weights[..., : self.width], self.shared), (weights[..., self.width :], self.own))
        shared, own = (float32_product(_parted(part, of.shape[0]).transpose(1, 2), _parted(rows, of.shape[0])) for part, of in parts)
        return shared, own


def by_part(rows: Float[Tensor, "K N X"], matrices: Float[Tensor, "KF X Y"]) -> Float[Tensor, "K N Y"]:
    """The rows in as many equal parts as there are matrices for each head, each times its own one; float32."""
    return float32_product(_parted(rows, len(matrices) // len(rows)), matrices).view(len(rows), rows.shape[1], -1)


def _parted(rows: Float[Tensor, "K N X"], parts: int) -> Float[Tensor, "KF n X"]:
    parted: Tensor = rows.unflatten(1, (parts, -1)).flatten(0, 1)
    return parted


class _Rows:
    """Places of a packed row as a rectangle [S, W]; a slice where they simply follow each other."""

    def __init__(self, sequences: Sequences, first: int, last: int, device: torch.device) -> None:
        self.shape = (len(sequences.lengths), last - first)
        self.real: Tensor | None = None
        self.padding: Tensor | None = None
        start = sequences.starts[0] + first
        self.places: slice | Tensor = slice(start, start + self.shape[0] * self.shape[1])
        if not sequences.follow(first, last):
            rows, real = sequences.rows(first, last)
            # padding stands on a token that is there
            self.places = torch.where(real, rows, sequences.starts[0]).flatten().to(device)
            if not real.all():
                self.real, self.padding = real.flatten().nonzero()[:, 0].to(device), ~real.flatten().to(device)

    def take(self, packed: Float[Tensor, "T H D"]) -> Float[Tensor, "SW H D"]:
        """The rectangle's rows; padding repeats a real one."""
        return packed[self.places] if isinstance(self.places, slice) else packed.index_select(0, self.places)

    def take_real(self, packed: Float[Tensor, "T H D"]) -> Float[Tensor, "SW H D"]:
        """The rectangle's rows, padding zero."""
        rows = self.take(packed)
        return rows if self.padding is None else rows.masked_fill(self.padding[:, None, None], 0.0)

    def put(self, rows: Float[Tensor, "SW H D"], into: Float[Tensor, "T H D"]) -> None:
        """Write real rows to their places."""
        if self.real is None:
            into[self.places] = rows
        else:
            into[self.places[self.real]] = rows[self.real]  # type: ignore[index]

    def add(self, rows: Float[Tensor, "SW H D"], into: Float[Tensor, "T H D"]) -> None:
        """Add rows to their places; those of padding must be zero."""
        if isinstance(self.places, slice):
            into[self.places] += rows
        else:
            into.index_add_(0, self.places, rows.contiguous())

    def by_head(self, packed: Float[Tensor, "T K D"]) -> Float[Tensor, "KS W D"]:
        """The rectangle's rows, a matrix for each head and sequence."""
        rows: Tensor = self.take(packed).unflatten(0, self.shape).permute(2, 0, 1, 3).flatten(0, 1)
        return rows

    def add_by_head(self, rows: Float[Tensor, "KS W D"], into: Float[Tensor, "T K D"]) -> None:
        """Add rows to where by_head took them from."""
        self.add(rows.unflatten(0, (-1, self.shape[0])).permute(1, 2, 0, 3).flatten(0, 1), into)


class _Part(NamedTuple):
    """A sequence of the packed row."""

    length: int
    start: int
    """Packed index of its first token."""


class _Group(NamedTuple):
    prompt: _Part
    completions: list[_Part]


def blocks_of(
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[Sequence[int]],
    window: int | None,
    device: torch.device,
    *,
    limit: int,
) -> list[Block]:
    """Every query of the packed row [all prompts, all completions] in one block, none of more than `limit` scores of a head if it can be
    cut. Completions without tokens are left out of `completion_lengths`."""
    found: list[Block] = []
    masks: Masks = {}
    starts = accumulate(chain([0], prompt_lengths, *completion_lengths))
    prompts, *groups = ([_Part(length, next(starts)) for length in lengths] for lengths in (prompt_lengths, *completion_lengths))
    few = min(limit, TOGETHER)
    for run in _runs(prompts, 0, window, few):
        found += _cut(_sequences([_Part(0, 0)], run), window, limit, device, masks)
    for family in _families(list(map(_Group, prompts, groups)), window, few):
        before = [group.prompt for group in family]
        parts = [part for group in family for part in group.completions]
        for run in _runs(parts, before[0].length, window, limit) if len(family) == 1 else filter(None, [parts]):
            found += _cut(_sequences(before, run), window, limit, device, masks)
    return found


def _sequences(before: Sequence[_Part], parts: Sequence[_Part]) -> Sequences:
    families, starts = (tuple(part.start for part in some) for some in (before, parts))
    return Sequences(before[0].length, families, starts, tuple(part.length for part in parts))


def _families(groups: Sequence[_Group], window: int | None, limit: int) -> Iterator[list[_Group]]:
    """Groups of as many completions behind prompts of one length, as long as they fit into one block."""
    family: list[_Group] = []
    for group in sorted(groups, key=lambda group: (group.prompt.length, len(group.completions))):
        before, size = group.prompt.length, len(group.completions)
        longest = max((part.length for one in (group, *family) for part in one.completions), default=0)
        scores = (len(family) + 1) * size * longest * (_reached(before, window) + longest)
        if family and (before != family[0].prompt.length or size != len(family[0].completions) or scores > limit):
            yield family
            family = []
        family.append(group)
    if family:
        yield family


def block_limit(heads: int, device: torch.device) -> int:
    """Scores of one head in a block on this device."""
    return BLOCK_SCORES["cuda" if device.type == "cuda" else "cpu"] // heads


def _runs(parts: Sequence[_Part], before: int, window: int | None, limit: int) -> Iterator[list[_Part]]:
    """Sequences of about one length together, while their scores stay within the limit and their padding costs less than a block."""
    run: list[_Part] = []
    padding = 0
    for part in sorted(parts, key=lambda part: -part.length):
        own, each = (one.length * (_reached(before, window) + one.length) for one in (part, run[0] if run else part))
        if run and ((len(run) + 1) * each > limit or padding + each - own > TOGETHER):
            yield run
            run, padding, each = [], 0, own
        run.append(part)
        padding += each - own
    if run:
        yield run


def _cut(sequences: Sequences, window: int | None, limit: int, device: torch.device, masks: Masks) -> Iterator[Block]:
    """Blocks of as many queries as the limit allows, and of no more than the window, whose keys others would not see."""
    longest = max(sequences.lengths)
    most = max(1, limit // (len(sequences.lengths) * max(1, _reached(sequences.before, window) + longest)))
    if window is not None and len(sequences.lengths) * longest * longest > TOGETHER:
        most = min(most, max(window, 64))
    count = math.ceil(longest / most)
    for index in range(count):
        queries = slice(longest * index // count, longest * (index + 1) // count)
        yield Block(sequences, queries, window, device, masks)


def _reached(before: int, window: int | None) -> int:
    return before if window is None else min(before, window - 1)


def _bias(before: int, shared: int, first: int, last: int, own: int, window: int | None, device: torch.device) -> Float[Tensor, "Q Y"]:
    """0 or -inf for queries `first` to `last` after `before` tokens; keys are the latest `shared` of those, and own ones from `own` on."""
    keys = torch.cat([torch.arange(before - shared, before), torch.arange(before + own, before + last)])
    allowed = within_window(torch.arange(before + first, before + last), keys, window)
    return torch.zeros(allowed.shape).masked_fill_(~allowed, -torch.inf).to(device)


class PackedAttention(torch.autograd.Function):
    """softmax(query key^T scaling) value over blocks; query [T H D], key and value [T K D] -> [T H D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scaling: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scaling = blocks, scaling
        out = torch.empty_like(query)
        for block in blocks:
            states = _States(block, query, key, value, scaling)
            rows = block.read(states.weights.to(query.dtype), states.shared_v, states.own_v)
            block.queries.put(states.packed(rows).to(out.dtype), out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """d score = weight (d weight - sum over keys of weight d weight); scores are made again."""
        query, key, value = ctx.saved_tensors
        totals = [torch.zeros_like(states, dtype=torch.float32) for states in (query, key, value)]
        for block in ctx.blocks:
            states = _States(block, query, key, value, ctx.scaling)
            states.add_gradients(grads[0], totals)
        return totals[0].to(query.dtype), totals[1].to(key.dtype), totals[2].to(value.dtype), None, None


class _States:
    """One block's queries, keys and values as [key heads, rows, D], and its attention weights."""

    def __init__(self, block: Block, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        self.block, self.kv_heads, self.dtype = block, key.shape[1], query.dtype
        # the power of two in the scaling comes first, which rounds nothing: unscaled products can pass float16's 65,504
        self.power = 2.0 ** math.floor(math.log2(scaling))
        self.rest = scaling / self.power
        self.query = self._heads(block.queries.take(query)) * self.power
        self.shared_k, self.shared_v = (block.shared.by_head(states) for states in (key, value))
        self.own_k, self.own_v = (block.own.by_head(states) for states in (key, value))
        self.weights = block.scores(self.query, self.shared_k, self.own_k, self.rest).softmax(-1)

    def _heads(self, rows: Float[Tensor, "SQ H D"]) -> Float[Tensor, "K SQR D"]:
        heads: Tensor = rows.unflatten(1, (self.kv_heads, -1)).transpose(0, 1).flatten(1, 2)
        return heads

    def packed(self, rows: Float[Tensor, "K SQR D"]) -> Float[Tensor, "SQ H D"]:
        """Rows by sequence and query again, all heads of each together."""
        count = self.block.shape[0] * self.block.shape[1]
        packed: Tensor = rows.unflatten(1, (count, -1)).transpose(0, 1).flatten(1, 2)
        return packed

    def add_gradients(self, grad: Float[Tensor, "T H D"], totals: Sequence[Tensor]) -> None:
        """Add what the block gives to d query, d key and d value."""
        block = self.block
        rows = self._heads(block.queries.take_real(grad))
        parts = [by_part(rows, values.transpose(1, 2)) for values in (self.shared_v, self.own_v)]
        weight_grad = torch.cat(parts, -1)
        score_grad = torch._softmax_backward_data(weight_grad, self.weights, -1, torch.float32).to(self.dtype)
        del parts, weight_grad
        if self.rest != 1.0:
            score_grad *= self.rest
        block.queries.add(self.packed(block.read(score_grad, self.shared_k, self.own_k)).mul_(self.power), totals[0])
        for total, weights, states in ((totals[1], score_grad, self.query), (totals[2], self.weights.to(self.dtype), rows)):
            shared, own = block.spread(weights, states)
            block.shared.add_by_head(shared, total)
            block.own.add_by_head(own, total)
