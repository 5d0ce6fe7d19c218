"""The nouns as tensors: the only padding in the program, and how a batch is cut into pieces that fit.

A GroupBatch keeps the group structure, so that the model can read a prompt once and its G completions beside it.
Padding is for addressing only: the model sees the real tokens, packed, and they alone count (model/attention.py).
How large a piece may be is not decided here (model/memory.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gemma_grpo.data.chat import PAD_ID
from gemma_grpo.data.packing import first_fit_decreasing
from gemma_grpo.types import RolloutGroup

Batch = TypeVar("Batch", bound="GroupBatch")


@dataclass(frozen=True)
class Slot:
    """Where a piece stands in the batch it was cut from: indices of its prompts, and of the completions of each, both ascending."""

    rows: tuple[int, ...]
    completions: tuple[int, ...]

    def places(self, device: torch.device) -> tuple[Int[Tensor, "n 1"], Int[Tensor, " g"]]:
        """The same as an index of the whole batch's [N G] or [N G C]."""
        return torch.tensor(self.rows, device=device)[:, None], torch.tensor(self.completions, device=device)

    def put(self, values: Tensor, into: Tensor) -> None:
        """Write a piece's [n g] or [n g c] values to their place in the whole batch's [N G] or [N G C]."""
        rows, completions = self.places(into.device)
        place = into[..., : values.shape[-1]] if values.dim() == 3 else into  # a piece is no wider than its own longest completion
        place[rows, completions] = values.to(into)

    def inner(self, part: Slot) -> Slot:
        """The place, in the same batch, of a part of this piece."""
        return Slot(tuple(self.rows[n] for n in part.rows), tuple(self.completions[g] for g in part.completions))


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

    @property
    def num_tokens(self) -> int:
        """Real tokens of the prompts and of their completions: what a pass computes."""
        return int(self.prompt_mask.sum() + self.completion_mask.sum())

    def slots(self, token_budget: int | None, *, whole_groups: bool = False) -> list[Slot]:
        """Cut into pieces of at most so many tokens, as few as are found quickly, the largest first. No padding counts.

        A piece is whole groups, whichever fill it; of a group that alone is too large, completions, each piece reading the prompt
        again. What cannot be cut further is a piece however large it is: one completion, or with `whole_groups` one group. None
        does not cut.
        """
        num_prompts, group = self.completion_ids.shape[:2]
        everything = tuple(range(group))
        if token_budget is None:
            return [Slot(tuple(range(num_prompts)), everything)]
        prompts: list[int] = self.prompt_mask.sum(-1).tolist()
        completions: list[list[int]] = self.completion_mask.sum(-1).tolist()
        groups = [prompt + sum(lengths) for prompt, lengths in zip(prompts, completions, strict=True)]
        slots: list[tuple[int, Slot]] = []
        for rows in first_fit_decreasing(groups, token_budget):
            if whole_groups or len(rows) > 1:
                slots.append((sum(groups[n] for n in rows), Slot(rows, everything)))
            else:
                (n,) = rows
                parts = first_fit_decreasing(completions[n], token_budget - prompts[n])  # one, if the group fits
                slots += [(prompts[n] + sum(completions[n][g] for g in part), Slot(rows, part)) for part in parts]
        # the largest first: if memory ends, then before time was spent
        return [slot for _, slot in sorted(slots, key=lambda sized: sized[0], reverse=True)]

    def piece(self: Batch, slot: Slot) -> Batch:
        """The part of the batch in a slot, trimmed to its own longest prompt and completion. Per-token fields end in C, prompt's in P."""
        rows, completions = slot.places(self.prompt_ids.device)
        prompt = _real_columns(self.prompt_mask[rows[:, 0]].any(0))
        completion = _real_columns(self.completion_mask[rows, completions].any(0).any(0))
        cut: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and f.name.startswith("prompt"):
                cut[f.name] = value[rows[:, 0], prompt]
            elif value is not None:
                part = value[rows, completions]
                cut[f.name] = part[..., : completion.stop] if value.dim() == 3 else part
        return replace(self, **cut)


@dataclass(frozen=True)
class PolicyBatch(GroupBatch):
    """What one optimizer step learns from. Token-aligned: entry t belongs to completion token t."""

    sampling_logprobs: Float[Tensor, "N G C"]
    advantages: Float[Tensor, "N G"]
    old_logprobs: Float[Tensor, "N G C"] | None
    """None before the first planning step, whose own forward provides them."""
    ref_logprobs: Float[Tensor, "N G C"] | None
    """None when no KL penalty asks for them."""


@dataclass(frozen=True)
class WeightedBatch(PolicyBatch):
    """A PolicyBatch with what each token's loss counts in the loss of the whole step: no cut of the batch changes it."""

    token_weights: Float[Tensor, "N G C"]


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


def _real_columns(real: Bool[Tensor, " T"]) -> slice:
    """From the first to the last column that any sequence reaches, at least one."""
    columns = real.nonzero()[:, 0]
    return slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 1)
