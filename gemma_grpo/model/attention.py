"""Grouped attention: a prompt is computed once, its G completions beside it.

Registered through transformers' AttentionInterface, so that PEFT, checkpointing and quantised layers keep working. The linear
layers see the real tokens packed into one row (all prompts, then all completions), and attention reads that row too (grouped.py).
The sliding window is computed from *positions*: flat indices of a packed row are silently wrong by 0.4 nats.
Owns the layout of a forward pass; not the padding (data/batch.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from gemma_grpo.data.batch import GroupBatch
from gemma_grpo.model.grouped import Block, PackedAttention, block_limit, blocks_of
from gemma_grpo.stopping import check

ATTENTION_NAME = "gemma_grpo_grouped"


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    layout: GroupLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; without a layout it is the plain SDPA path, so the model stays usable as it is."""
    if layout is None:
        plain = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, sliding_window=sliding_window, **kwargs
        )
        return plain[0], None
    check()  # a layer is the largest piece of a pass that ends in time
    if dropout:
        raise ValueError(f"the model's attention_dropout is {dropout}; grouped attention has none, as Gemma 3. Set it to 0 in its config.")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    return layout.attend(layer, query, key, value, scaling=scaling, window=sliding_window), None


AttentionInterface.register(ATTENTION_NAME, grouped_attention)
AttentionMaskInterface.register(ATTENTION_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class GroupLayout:
    """Training, scoring and prefill: N prompts and their completions, packed as [all prompt tokens, all completion tokens]."""

    def __init__(self, batch: GroupBatch, *, keep_prompt_kv: Callable[[int, Tensor, Tensor], None] | None = None) -> None:
        """`keep_prompt_kv` is given each layer's number, keys and values of the prompts [N K P D]."""
        self.batch = batch
        self.num_prompt_tokens = int(batch.prompt_mask.sum())
        self.keep_prompt_kv = keep_prompt_kv
        self._blocks: dict[int | None, list[Block]] = {}

    @cached_property
    def input_ids(self) -> Int[Tensor, "1 T"]:
        """Real tokens only, packed."""
        return self._pack(self.batch.prompt_ids, self.batch.completion_ids)

    @cached_property
    def position_ids(self) -> Int[Tensor, "1 T"]:
        """Every completion of a prompt starts at the same position: the prompt's length."""
        return self._pack(self.batch.prompt_positions, self.batch.completion_positions)

    @cached_property
    def completion_index(self) -> Int[Tensor, "N G C"]:
        """Where each completion token stands in the packed row; meaningless on padding."""
        mask = self.batch.completion_mask
        return self.num_prompt_tokens + mask.flatten().long().cumsum(0).sub(1).clamp(min=0).view_as(self.batch.completion_ids)

    @cached_property
    def last_prompt_index(self) -> Int[Tensor, " N"]:
        """Where each prompt's last real token stands in the packed row."""
        return self.batch.prompt_mask.sum(-1).cumsum(0) - 1

    @cached_property
    def last_completion_index(self) -> Int[Tensor, "N G"]:
        """Where each completion's last real token stands in the packed row; meaningless for an empty completion."""
        lengths = self.batch.completion_mask.sum(-1)
        return self.num_prompt_tokens + lengths.flatten().cumsum(0).view_as(lengths) - 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None) -> Tensor:
        """Prompts among themselves; each completion to [its prompt ; itself].

        query [1 H T D], key and value [1 K T D] -> [1 T H D]; window None is full attention.
        """
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # (T, heads, D)
        if self.keep_prompt_kv is not None:
            self.keep_prompt_kv(layer, *(self._unpacked(states[: self.num_prompt_tokens]) for states in (k, v)))
        if window not in self._blocks:
            self._blocks[window] = blocks_of(*self._lengths, window, q.device, limit=block_limit(q.shape[1], q.device))
        out: Tensor = PackedAttention.apply(q, k, v, self._blocks[window], scaling)  # type: ignore[no-untyped-call]
        return out[None]

    @cached_property
    def _lengths(self) -> tuple[list[int], list[list[int]]]:
        """Of the prompts, and of each one's completions that have tokens."""
        prompts: list[int] = self.batch.prompt_mask.sum(-1).tolist()
        completions: list[list[int]] = self.batch.completion_mask.sum(-1).tolist()
        return prompts, [[length for length in group if length] for group in completions]

    @cached_property
    def _prompt_places(self) -> Int[Tensor, " T"]:
        return self.batch.prompt_mask.flatten().nonzero()[:, 0]

    def _unpacked(self, states: Float[Tensor, "T H D"]) -> Float[Tensor, "N H P D"]:
        """The prompts' tokens as a rectangle again; zeros on padding."""
        mask = self.batch.prompt_mask
        padded = states.new_zeros((mask.numel(), *states.shape[1:])).index_copy(0, self._prompt_places, states)
        return padded.view(*mask.shape, *states.shape[1:]).transpose(1, 2)

    def _pack(self, prompts: Tensor, completions: Tensor) -> Tensor:
        return torch.cat([prompts[self.batch.prompt_mask], completions[self.batch.completion_mask]])[None]
