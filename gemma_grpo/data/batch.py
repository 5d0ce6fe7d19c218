"""The nouns as tensors: the only padding in the program.

A GroupBatch keeps the group structure, so that the model can read a prompt once and its G completions beside it.
Padding is a rectangle for attention only: the model's linear layers see the real tokens, packed (model/attention.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gemma_grpo.data.chat import PAD_ID
from gemma_grpo.types import RolloutGroup

Batch = TypeVar("Batch", bound="GroupBatch")


@dataclass(frozen=True)
class GroupBatch:
    """N prompts with G completions each, right-padded; masks are True on real tokens."""

    prompt_ids: Int[Tensor, "N P"]
    prompt_mask: Bool[Tensor, "N P"]
    completion_ids: Int[Tensor, "N G C"]
    completion_mask: Bool[Tensor, "N G C"]

    @property
    def prompt_positions(self) -> Int[Tensor, "N P"]:
        """Position of each prompt token: 0 at <bos>, wherever the padding is."""
        return (self.prompt_mask.long().cumsum(-1) - 1).clamp(min=0)

    @property
    def completion_positions(self) -> Int[Tensor, "N G C"]:
        """Position of each completion token: counted on from its prompt's last one."""
        start = self.prompt_mask.sum(-1)[:, None, None]
        return (start + self.completion_mask.long().cumsum(-1) - 1).clamp(min=0)

    def to(self: Batch, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {f.name: _moved(getattr(self, f.name), device) for f in fields(self)}
        return replace(self, **moved)

    def split(self: Batch, prompts_per_piece: int) -> Iterator[Batch]:
        """Pieces of whole groups, in order, each trimmed to its own longest prompt and completion."""
        for start in range(0, len(self.prompt_ids), prompts_per_piece):
            rows = slice(start, start + prompts_per_piece)
            sliced: dict[str, Any] = {f.name: _sliced(getattr(self, f.name), rows) for f in fields(self)}
            yield _trimmed(replace(self, **sliced))


@dataclass(frozen=True)
class PolicyBatch(GroupBatch):
    """What one optimizer step learns from. Token-aligned: entry t belongs to completion token t."""

    sampling_logprobs: Float[Tensor, "N G C"]
    advantages: Float[Tensor, "N G"]
    old_logprobs: Float[Tensor, "N G C"] | None
    """None before the first planning step, whose own forward provides them."""
    ref_logprobs: Float[Tensor, "N G C"] | None
    """None when no KL penalty asks for them."""


def pad_sequences(sequences: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Right-pad token ids to the longest; at least one column, so that empty completions keep a shape."""
    width = max([1, *(len(sequence) for sequence in sequences)])
    ids = torch.full((len(sequences), width), PAD_ID, dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = True
    return ids, mask


def pad_groups(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]) -> GroupBatch:
    """N prompts and G completions of each as one batch. Raises ValueError when the groups differ in size."""
    sizes = {len(group) for group in completions}
    if len(prompts) != len(completions) or len(sizes) != 1:
        raise ValueError(f"{len(prompts)} prompts with groups of sizes {sorted(sizes)}: every prompt needs the same number of completions.")
    prompt_ids, prompt_mask = pad_sequences(prompts)
    flat_ids, flat_mask = pad_sequences([completion for group in completions for completion in group])
    shape = (len(prompts), sizes.pop(), -1)
    return GroupBatch(prompt_ids, prompt_mask, flat_ids.reshape(shape), flat_mask.reshape(shape))


def pad_rollouts(groups: Sequence[RolloutGroup], suffix_ids: Sequence[int] = ()) -> GroupBatch:
    """Rollout groups as a batch, each completion followed by suffix_ids (the judge's question, when scoring)."""
    return pad_groups(
        [group.prompt.token_ids for group in groups],
        [[(*completion.token_ids, *suffix_ids) for completion in group.completions] for group in groups],
    )


def pad_values(groups: Sequence[Sequence[Sequence[float]]], like: GroupBatch) -> Float[Tensor, "N G C"]:
    """Per-token numbers of each completion in the shape of a batch; 0 on padding."""
    values = torch.zeros(like.completion_ids.shape, dtype=torch.float32)
    for n, group in enumerate(groups):
        for g, row in enumerate(group):
            values[n, g, : len(row)] = torch.tensor(row, dtype=torch.float32)
    return values


def _moved(value: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if value is None else value.to(device)


def _sliced(value: Tensor | None, rows: slice) -> Tensor | None:
    return None if value is None else value[rows]


def _trimmed(batch: Batch) -> Batch:
    """Without the columns no sequence of this batch reaches. Per-token fields end in C, prompt fields in P."""
    real = {"prompt": batch.prompt_mask.any(0), "completion": batch.completion_mask.any(0).any(0)}
    start = {"prompt": int(real["prompt"].long().argmax()), "completion": 0}
    stop = {name: max(1, int(columns.nonzero().max()) + 1 if columns.any() else 1) for name, columns in real.items()}
    cut: dict[str, Any] = {}
    for f in fields(batch):
        value = getattr(batch, f.name)
        if value is not None and f.name != "advantages":
            part = "prompt" if f.name.startswith("prompt") else "completion"
            cut[f.name] = value[..., start[part] : stop[part]]
    return replace(batch, **cut)
