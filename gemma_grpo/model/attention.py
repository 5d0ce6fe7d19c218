"""Grouped attention: a prompt is computed once, its G completions beside it.

Registered through transformers' AttentionInterface, so that PEFT, checkpointing and quantised layers keep working. The linear
layers see the real tokens packed into one row (all prompts, then all completions); only here they become rectangles.
The sliding window is computed from *positions*: flat indices of a packed row are silently wrong by 0.4 nats.
Owns the layouts a forward pass can have; not the padding (data/batch.py).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from gemma_grpo.data.batch import GroupBatch

ATTENTION_NAME = "gemma_grpo_grouped"


@runtime_checkable
class Layout(Protocol):
    """Who attends to whom in one forward pass."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None, dropout: float
    ) -> Tensor:
        """query [1 or B, H, T, D], key and value [.., K, T, D] -> [.., T, H, D]; window None is full attention."""
        ...


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
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; without a layout it is the plain SDPA path, so the model stays usable as it is."""
    if layout is None:
        plain = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, sliding_window=sliding_window, **kwargs
        )
        return plain[0], None
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    return layout.attend(layer, query, key, value, scaling=scaling, window=sliding_window, dropout=dropout), None


AttentionInterface.register(ATTENTION_NAME, grouped_attention)
AttentionMaskInterface.register(ATTENTION_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def within_window(query_positions: Int[Tensor, "*b Q"], key_positions: Int[Tensor, "*b K"], window: int | None) -> Bool[Tensor, "*b Q K"]:
    """Causal, and no further back than the window, which counts the token itself (transformers: key > query - window)."""
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def expand_heads(states: Float[Tensor, "B K T D"], heads: int) -> Float[Tensor, "B H T D"]:
    """Each of K key heads repeated for its query heads. Done here for every card: SDPA's own grouping has no fused kernel before sm_80."""
    return states.repeat_interleave(heads // states.shape[1], dim=1)


class GroupLayout:
    """Training, scoring and prefill: N prompts and their completions, packed as [all prompt tokens, all completion tokens]."""

    def __init__(self, batch: GroupBatch, *, keep_prompt_kv: bool = False) -> None:
        self.batch = batch
        self.num_prompt_tokens = int(batch.prompt_mask.sum())
        self.prompt_kv: dict[int, tuple[Tensor, Tensor]] | None = {} if keep_prompt_kv else None
        """Layer -> keys and values [N K P D], kept for decoding when asked."""
        self._masks: dict[tuple[str, int | None], Tensor] = {}

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

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None, dropout: float
    ) -> Tensor:
        """Prompts among themselves; each completion to [its prompt ; itself]."""
        heads, split = query.shape[1], self.num_prompt_tokens
        prompt_mask, completion_mask = self.batch.prompt_mask, self.batch.completion_mask
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # (T, heads, D)
        prompt_q, prompt_k, prompt_v = (_unpack(states[:split], prompt_mask) for states in (q, k, v))
        if self.prompt_kv is not None:
            self.prompt_kv[layer] = (prompt_k, prompt_v)
        mask = self._prompt_attention_mask(window)
        prompt_k, prompt_v = expand_heads(prompt_k, heads), expand_heads(prompt_v, heads)
        prompt_out = scaled_dot_product_attention(prompt_q, prompt_k, prompt_v, mask, dropout, scale=scaling)
        packed = [prompt_out.transpose(1, 2)[prompt_mask]]
        if q.shape[0] > split:
            flat_mask = completion_mask.flatten(0, 1)
            own_q, own_k, own_v = (_unpack(states[split:], flat_mask) for states in (q, k, v))
            group = completion_mask.shape[1]
            keys = torch.cat([prompt_k.repeat_interleave(group, 0), expand_heads(own_k, heads)], dim=2)
            values = torch.cat([prompt_v.repeat_interleave(group, 0), expand_heads(own_v, heads)], dim=2)
            mask = self._completion_attention_mask(window)
            own_out = scaled_dot_product_attention(own_q, keys, values, mask, dropout, scale=scaling)
            packed.append(own_out.transpose(1, 2)[flat_mask])
        return torch.cat(packed)[None]

    def _pack(self, prompts: Tensor, completions: Tensor) -> Tensor:
        return torch.cat([prompts[self.batch.prompt_mask], completions[self.batch.completion_mask]])[None]

    def _prompt_attention_mask(self, window: int | None) -> Bool[Tensor, "N 1 P P"]:
        if ("prompt", window) not in self._masks:
            positions, real = self.batch.prompt_positions, self.batch.prompt_mask
            allowed = within_window(positions, positions, window) & real[:, None, :]
            # a padded row attends to itself: a softmax over nothing would be NaN, and NaN times 0 is NaN in the backward pass
            allowed = allowed | torch.eye(positions.shape[1], dtype=torch.bool, device=real.device)
            self._masks["prompt", window] = allowed[:, None]
        return self._masks["prompt", window]

    def _completion_attention_mask(self, window: int | None) -> Bool[Tensor, "B 1 C PC"]:
        if ("completion", window) not in self._masks:
            positions, real = self.batch.completion_positions.flatten(0, 1), self.batch.completion_mask.flatten(0, 1)
            group = self.batch.completion_mask.shape[1]
            prompt_positions = self.batch.prompt_positions.repeat_interleave(group, 0)
            prompt_real = self.batch.prompt_mask.repeat_interleave(group, 0)
            to_prompt = within_window(positions, prompt_positions, window) & prompt_real[:, None, :]
            to_own = within_window(positions, positions, window) & real[:, None, :]
            to_own = to_own | torch.eye(positions.shape[1], dtype=torch.bool, device=real.device)
            self._masks["completion", window] = torch.cat([to_prompt, to_own], dim=-1)[:, None]
        return self._masks["completion", window]


class DecodeLayout:
    """One more token of every completion: B = N*G rows read N prompts' keys as one matrix product, and their own keys."""

    def __init__(self, prefill: GroupLayout, group: int, max_tokens: int) -> None:
        if prefill.prompt_kv is None:
            raise ValueError("the prefill layout kept no keys: build it with keep_prompt_kv=True.")
        self.prompt_kv = prefill.prompt_kv
        self.prompt_mask = prefill.batch.prompt_mask
        self.prompt_positions = prefill.batch.prompt_positions
        self.prompt_lengths = self.prompt_mask.sum(-1)  # (N,)
        self.group, self.max_tokens = group, max_tokens
        self.own_kv: dict[int, tuple[Tensor, Tensor]] = {}
        self.length = 0
        """Completion tokens already in the cache, before the one now computed."""
        self._masks: dict[int | None, tuple[Tensor, Tensor]] = {}

    def next_positions(self) -> Int[Tensor, "B 1"]:
        """Position of the token now computed, for each row."""
        return (self.prompt_lengths + self.length).repeat_interleave(self.group)[:, None]

    def advance(self) -> None:
        """Every layer has seen the token: the next call computes the one after it."""
        self.length += 1
        self._masks.clear()

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None, dropout: float
    ) -> Tensor:
        """query [B H 1 D] -> [B 1 H D]. One softmax over both parts' scores, in float32."""
        own_k, own_v = self._remember(layer, key, value)
        # the power of two in the scaling comes first, which rounds nothing: unscaled products can pass float16's 65,504
        power = 2.0 ** math.floor(math.log2(scaling))
        query, scaling = query * power, scaling / power
        prompt_k, prompt_v = self.prompt_kv[layer]
        num_prompts, kv_heads, _, dim = prompt_k.shape
        shared = query.view(num_prompts, self.group, kv_heads, -1, dim).transpose(1, 2).flatten(2, 3)  # (N, K, G*R, D)
        own = query.view(len(query), kv_heads, -1, dim)  # (B, K, R, D)
        prompt_allowed, own_allowed = self._allowed(window)
        prompt_scores = (shared @ prompt_k.transpose(2, 3)).float() * scaling  # (N, K, G*R, P)
        prompt_scores = prompt_scores.masked_fill(~prompt_allowed, -torch.inf)
        own_scores = (own @ own_k.transpose(2, 3)).float() * scaling  # (B, K, R, L)
        own_scores = own_scores.masked_fill(~own_allowed, -torch.inf)
        prompt_scores = self._by_row(prompt_scores)  # (B, K, R, P)
        weights = torch.cat([prompt_scores, own_scores], -1).softmax(-1).to(query.dtype)
        prompt_weights, own_weights = weights[..., : prompt_k.shape[2]], weights[..., prompt_k.shape[2] :]
        out: Tensor = self._by_row(self._by_prompt(prompt_weights) @ prompt_v) + own_weights @ own_v
        return out.reshape(len(query), 1, -1, dim)

    def _remember(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.own_kv:
            shape = (key.shape[0], key.shape[1], self.max_tokens, key.shape[3])
            self.own_kv[layer] = (key.new_empty(shape), value.new_empty(shape))
        keys, values = self.own_kv[layer]
        keys[:, :, self.length] = key[:, :, 0]
        values[:, :, self.length] = value[:, :, 0]
        return keys[:, :, : self.length + 1], values[:, :, : self.length + 1]

    def _allowed(self, window: int | None) -> tuple[Bool[Tensor, "N 1 1 P"], Bool[Tensor, " L"]]:
        if window not in self._masks:
            position = (self.prompt_lengths + self.length)[:, None]
            to_prompt = within_window(position, self.prompt_positions, window) & self.prompt_mask[:, None, :]
            steps = torch.arange(self.length + 1, device=self.prompt_mask.device)
            self._masks[window] = (to_prompt[:, None], within_window(steps[-1:], steps, window)[0])
        return self._masks[window]

    def _by_row(self, states: Float[Tensor, "N K GR X"]) -> Float[Tensor, "B K R X"]:
        num_prompts, kv_heads, _, width = states.shape
        return states.view(num_prompts, kv_heads, self.group, -1, width).transpose(1, 2).flatten(0, 1)

    def _by_prompt(self, states: Float[Tensor, "B K R X"]) -> Float[Tensor, "N K GR X"]:
        _, kv_heads, repeats, width = states.shape
        return states.view(-1, self.group, kv_heads, repeats, width).transpose(1, 2).flatten(2, 3)


def _unpack(states: Float[Tensor, "T H D"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B H L D"]:
    """Packed real tokens back into a rectangle; zeros on padding."""
    slots = mask.flatten().nonzero()[:, 0]
    padded = states.new_zeros((mask.numel(), *states.shape[1:])).index_copy(0, slots, states)
    return padded.view(*mask.shape, *states.shape[1:]).transpose(1, 2)
