"""What sampling takes at a time, in bytes: keys and values, one token drawn for every row, and one layer of the next one."""

from __future__ import annotations

from gemma_grpo.config.schema import GRPOConfig
from gemma_grpo.planner.terms import Numbers
from gemma_grpo.room import Room
from gemma_grpo.shapes import ModelShape

DRAW_COPIES, TOP_K_COPIES, TOP_P_COPIES = 2.0, 3.0, 6.25
"""[rows, vocabulary] in float32 at once (rollout/sampling.py): logits and their exponential; those that are left beside them; sorted
with their places, which are worth two each, their sums, these less themselves, and a mask of bytes."""
CUDA_SORT_COPIES = 4
"""Workspace of a sort on CUDA: not measured."""
SEARCHED = 512 * (8 + 8 + 4)
"""Bytes for each row: the block of the vocabulary that is searched, as places, as places that exist, and as numbers."""
ROW_BYTES = 8 + 4
"""A token and its log-probability."""


def kv_cache(shape: ModelShape, numbers: Numbers, room: Room) -> tuple[float, float]:
    """Keys and values in sliding and global layers: a prompt's once for its group; a sliding layer keeps what its window reaches, of a
    prompt one token less, as the token now computed is inside the window."""
    window = shape.sliding_window
    sliding = room.prompts * min(room.width, window - 1) + room.rows * min(room.length, window)
    each = shape.kv_bytes_per_token_per_layer(numbers.bytes)
    return each * shape.num_sliding_layers * sliding, each * shape.num_global_layers * room.tokens


def rows(shape: ModelShape, numbers: Numbers, room: Room) -> float:
    """What is known of every row, the prompts' last hidden states, and cosines and sines of every position."""
    known = ROW_BYTES * room.rows * (room.length + 1) + numbers.bytes * shape.hidden_size * room.prompts
    return known + 4 * shape.head_dim * numbers.bytes * (room.width + room.length)


def drawing(shape: ModelShape, config: GRPOConfig, numbers: Numbers, room: Room) -> float:
    """Drawing one token for each row: copies of the float32 distribution over the vocabulary. In 16 bits on a CPU logits are made from
    a float32 copy of the whole head."""
    copies = TOP_K_COPIES if config.sampling.top_k else DRAW_COPIES
    if config.sampling.top_p < 1:
        copies = TOP_P_COPIES + bool(config.sampling.top_k) + CUDA_SORT_COPIES * numbers.on_cuda
    copies += config.temperature != 1.0  # the first token's, whose logits are kept as they were
    one = 4 * room.rows * shape.vocab_size
    head = 4 * shape.embedding_parameters if numbers.bytes == 2 and not numbers.on_cuda else 0
    return max(copies * one + SEARCHED * room.rows, one + head)


def decoding(shape: ModelShape, numbers: Numbers, room: Room) -> float:
    """One new token of each row in a layer: queries and keys being rotated, scores (three copies, and masks), or the feed-forward half.

    In 16 bits on a CPU the keys are multiplied as float32 copies.
    """
    hidden, query, kv, size = shape.hidden_size, shape.query_width, shape.kv_width, numbers.bytes
    projected = size * (hidden + query + 2 * kv + 4 * shape.head_dim)  # stream, queries, keys, values, angles of both kinds
    rotating = size * 4 * (query + kv)
    scores = size * (query + kv) + 4 * (3 * shape.num_heads + 2) * (room.width + room.length)
    feeding = size * (2 * query + kv + 2 * hidden + 3 * shape.intermediate_size)
    own = room.length if shape.num_global_layers else min(room.length, shape.sliding_window)
    widened = 4 * kv * max(room.rows * own, room.prompts * room.width) if size == 2 and not numbers.on_cuda else 0
    return room.rows * projected + max(room.rows * max(rotating, feeding), room.rows * scores + widened)
