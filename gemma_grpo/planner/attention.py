"""What attention takes at a time, in bytes: scores exist for one block of queries at a time, as model/grouped.py cuts them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.planner.terms import Numbers, Pass, lora_inputs
from gemma_grpo.shapes import ModelShape

BLOCK_SCORES = {"cpu": 2**21, "cuda": 2**26}
"""model/grouped.py makes so many scores at a time, of all heads together."""
TOGETHER = 2**14
"""Of one head: several prompts, or groups, share a block up to so many."""


@dataclass(frozen=True)
class _Blocks:
    """Sequences of one length behind the same tokens, as they are cut: the last block, which is the largest."""

    sequences: float
    """Of one block."""
    queries: int
    """Of each sequence."""
    keys: int
    """That each sequence's queries read."""
    own: int
    """Of these, the sequence's own."""
    mean_keys: float
    """Of a sequence's blocks."""
    parts: int
    """That each sequence's queries are cut into."""

    @property
    def rows(self) -> float:
        """Queries of one block."""
        return self.sequences * self.queries


def masks(shape: ModelShape, numbers: Numbers, piece: Pass) -> float:
    """One for each part of a prompt and of a completion, in both kinds of layer, float32; kept for the whole pass.

    Counted for groups of the same lengths, which share them; others each have their own, which is little beside their tokens.
    """
    each = [cut.parts * cut.queries * cut.mean_keys for window in _windows(shape) for cut in _cuts(shape, numbers, piece, window)]
    return 4 * sum(each)


def saved(shape: ModelShape, lora: LoraSettings, numbers: Numbers, piece: Pass) -> float:
    """What one layer's attention keeps for its backward pass, without the layer's input.

    Adapter inputs; queries and keys before their norm (float32), rotated, and values. No scores, and no output.
    """
    query, kv = shape.query_width, shape.kv_width
    per_token = lora_inputs(shape, lora, numbers, {"q_proj", "k_proj", "v_proj", "o_proj"})
    return (per_token + 4 * (query + kv) + numbers.bytes * (query + 2 * kv)) * piece.tokens


def forward(shape: ModelShape, numbers: Numbers, piece: Pass) -> float:
    """Stream, embedding and normed input; queries and output, keys and values; the scores of a block, in two parts and joined, beside
    the weights of the block before."""
    packed = 3 * shape.hidden_size + 2 * shape.query_width + 2 * shape.kv_width
    return numbers.bytes * packed * piece.tokens + _block(shape, numbers, piece, score_bytes=3 * 4, rows=2)


def prefill(shape: ModelShape, numbers: Numbers, prompt_tokens: float) -> float:
    """Before a prompt's attention: keys and values as rectangles for the cache, the last of them three times."""
    return numbers.bytes * (3 * shape.hidden_size + shape.query_width + 6 * shape.kv_width) * prompt_tokens


def backward(shape: ModelShape, numbers: Numbers, piece: Pass) -> float:
    """Gradients beyond what attention saved: while a block's scores are there, while the sums of all blocks are rounded to 16 bits, or
    in the queries' norm, when what was saved of queries, keys and values after it is gone.

    Four copies of a block's scores: weights, their gradient in two parts and joined, and that of the scores.
    """
    hidden, query, kv, size, short = shape.hidden_size, shape.query_width, shape.kv_width, numbers.bytes, numbers.bytes == 2
    sums = size * (hidden + query) + 4 * (query + 2 * kv)  # beside the gradients of stream and output
    rounded = sums + 2 * (query + 2 * kv) * short
    norm = size * (hidden - query) + 4 * (5 * query - kv)
    block = _block(shape, numbers, piece, score_bytes=4 * 4 + 2 * short, rows=2)
    return max(sums * piece.tokens + block, max(rounded, norm) * piece.tokens)


def _block(shape: ModelShape, numbers: Numbers, piece: Pass, score_bytes: int, rows: int) -> float:
    """The largest block: its scores, its queries or gradients of the output `rows` times, and its sequences' own keys and values."""
    most = 0.0
    for window in _windows(shape):
        for cut in _cuts(shape, numbers, piece, window):
            states = rows * shape.query_width * cut.rows + 2 * shape.kv_width * cut.sequences * cut.own
            most = max(most, score_bytes * shape.num_heads * cut.rows * cut.keys + numbers.bytes * states)
    return most


def _windows(shape: ModelShape) -> list[int | None]:
    """Of the kinds of layer that there are; None sees everything."""
    return [None] * bool(shape.num_global_layers) + [shape.sliding_window] * bool(shape.num_sliding_layers)


def _cuts(shape: ModelShape, numbers: Numbers, piece: Pass, window: int | None) -> list[_Blocks]:
    """Of prompts, and of completions: of one group, or of as many short ones as share a block."""
    limit = BLOCK_SCORES["cuda" if numbers.on_cuda else "cpu"] // shape.num_heads
    few, prompt, length = min(limit, TOGETHER), piece.prompt_length, piece.completion_length
    found = [_cut(_shared(piece.prompts, prompt * prompt, few), prompt, 0, window, limit)]
    if piece.group and length:
        each = piece.group * length * (_reached(prompt, window) + length)
        found.append(_cut(piece.group * _shared(piece.prompts, each, few), length, prompt, window, limit))
    return found


def _shared(available: float, scores: float, limit: int) -> float:
    """How many share a block, each with so many scores of a head."""
    return min(max(1, available), max(1, limit // scores))


def _reached(before: int, window: int | None) -> int:
    return before if window is None else min(before, window - 1)


def _cut(sequences: float, length: int, before: int, window: int | None, limit: int) -> _Blocks:
    """As model/grouped.py does: as many sequences together as the limit allows, then as many queries of each, a window's at most."""
    reached = _reached(before, window)
    together = min(sequences, max(1, limit // (length * (reached + length))))
    most = max(1, int(limit / (together * (reached + length))))
    if window is not None and together * length * length > TOGETHER:
        most = min(most, max(window, 64))
    parts = math.ceil(length / most)
    queries = math.ceil(length / parts)
    seen = before + length if window is None else queries + window - 1
    mean = before + length * (parts + 1) / (2 * parts)
    keys, own = min(before + length, seen), min(length, seen)
    return _Blocks(together, queries, keys, own, min(mean, seen), parts)
