"""Keys and values while sampling: each prompt's once for all of its completions, each completion's own beside them.

Static buffers: rows come and go, and none grows while tokens are drawn. Sliding layers keep what their window reaches: the end
of a prompt, and the latest of a completion's own tokens in a ring. Owns who may be read by whom while decoding, which rows live, and
that what a gone row left behind is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemma_grpo.model.precision import float32_product

_NOWHERE = -(2**30)
"""Position of padding: before every window."""


@dataclass(frozen=True)
class Extent:
    """How much of the buffers a step reads. All on the host, so that steps of one extent are the same work on other numbers."""

    rows: int
    prompts: int
    group: int
    """Largest number of rows that read the same prompt."""
    ordered: bool
    """Rows stand prompt by prompt, `group` of each: no gathering is needed."""
    prompt_width: int
    length: int
    """Own tokens of the longest row, the one now computed included."""
    aligned: bool
    """Every row has as many tokens, `length`, and every prompt as many, `prompt_width`: only windows need a mask."""


class _Kind:
    """Buffers of all sliding, or all global, layers. Keys are [0], values [1]."""

    def __init__(
        self, layers: Sequence[int], window: int | None, sizes: tuple[int, int, int, int], heads: tuple[int, int], like: Tensor
    ) -> None:
        prompts, prompt_width, rows, length = sizes
        self.window, self.index = window, {layer: index for index, layer in enumerate(layers)}
        # the token now computed is inside its own window: of the prompt, one less can ever be read
        self.prompt_width = prompt_width if window is None else max(1, min(prompt_width, window - 1))
        self.ring = length if window is None else min(length, window)
        self.prompt = like.new_zeros((2, len(layers), prompts, heads[0], self.prompt_width, heads[1]))
        # zeros: a masked key's score may be any number but NaN
        self.own = like.new_zeros((2, len(layers), rows, heads[0], self.ring, heads[1]))
        self.prompt_positions = torch.full((prompts, self.prompt_width), _NOWHERE, device=like.device)

    def store_prompts(self, layer: int, keys: Tensor, values: Tensor, lengths: Tensor, first: int) -> None:
        """Keys and values [n K P D] of prompts of these lengths, into the slots from `first` on: the last tokens that fit."""
        slots, width = slice(first, first + len(keys)), self.prompt_width
        columns = (lengths[:, None] - width).clamp(min=0) + torch.arange(min(width, keys.shape[2]), device=keys.device)  # (n, w)
        columns = columns.clamp(max=keys.shape[2] - 1)
        for buffer, states in zip(self.prompt, (keys, values), strict=True):
            picked = states.gather(2, columns[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3]))
            buffer[self.index[layer], slots, :, : columns.shape[1]] = picked
        self.prompt_positions[slots] = _NOWHERE
        self.prompt_positions[slots, : columns.shape[1]] = torch.where(columns < lengths[:, None], columns, _NOWHERE)


class DecodeCache:
    """Room for so many prompts and rows (completions being sampled). A row reads its prompt's keys and its own."""

    def __init__(
        self,
        windows: Sequence[int | None],
        *,
        heads: tuple[int, int],
        prompts: int,
        prompt_width: int,
        rows: int,
        length: int,
        like: Tensor,
    ) -> None:
        """`windows` by layer, None for global ones; `heads` is (key heads, size of one); `like` gives dtype and device."""
        sizes = (prompts, prompt_width, rows, length)
        by_window = {window: [layer for layer, own in enumerate(windows) if own == window] for window in windows}
        self._kinds = {window: _Kind(layers, window, sizes, heads, like) for window, layers in by_window.items()}
        self._kind_of = [self._kinds[window] for window in windows]
        self.prompt_lengths = torch.zeros(prompts, dtype=torch.long, device=like.device)
        self.prompt_of_row = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)
        """Own tokens of each row that have keys already."""
        self._row_of_cell = torch.zeros(prompts * rows, dtype=torch.long, device=like.device)
        self._cell_of_row = torch.zeros(rows, dtype=torch.long, device=like.device)
        self._all_rows = torch.arange(rows, device=like.device)
        self._columns = torch.arange(length, device=like.device)
        self.max_length = length
        self.host_prompt_lengths: list[int] = []
        self.host_prompt_of_row: list[int] = []
        self.host_lengths: list[int] = []

    # ---- who is there

    @property
    def num_prompts(self) -> int:
        """Slots taken."""
        return len(self.host_prompt_lengths)

    def prefilling(self, batch_lengths: Int[Tensor, " n"]) -> _Prefill:
        """Takes the keys and values of prompts from the pass that computes them, into the next free slots."""
        first = len(self.host_prompt_lengths)
        self.prompt_lengths[first : first + len(batch_lengths)] = batch_lengths
        self.host_prompt_lengths += batch_lengths.tolist()
        return _Prefill(self._kind_of, batch_lengths, first)

    def add_rows(self, prompts: Sequence[int]) -> None:
        """One more row for each of these prompt slots, without tokens of its own yet."""
        first, device = len(self.host_prompt_of_row), self.lengths.device
        self.host_prompt_of_row += prompts
        self.host_lengths += [0] * len(prompts)
        slots = slice(first, len(self.host_prompt_of_row))
        self.prompt_of_row[slots] = torch.tensor(prompts, device=device)
        self.lengths[slots] = 0
        self._arrange()

    def keep_rows(self, kept: Sequence[int]) -> None:
        """Row i is now the former row kept[i]; the others are gone."""
        moved = [(to, source) for to, source in enumerate(kept) if to != source]
        if moved:
            to, source = (torch.tensor(side, device=self.lengths.device) for side in zip(*moved, strict=True))
            used = max(self.host_lengths[source] for _, source in moved)
            for kind in self._kinds.values():
                for states in kind.own.flatten(0, 1):  # a layer at a time: what moves is copied on its way
                    states[to, :, :used] = states[source, :, :used]
            self.prompt_of_row[to], self.lengths[to] = self.prompt_of_row[source], self.lengths[source]
        self.host_prompt_of_row = [self.host_prompt_of_row[row] for row in kept]
        self.host_lengths = [self.host_lengths[row] for row in kept]
        self._arrange()

    def keep_prompts(self, kept: Sequence[int]) -> None:
        """Prompt slot i is now the former slot kept[i]; no row reads the others any more."""
        moved = [(to, source) for to, source in enumerate(kept) if to != source]
        if moved:
            to, source = (torch.tensor(side, device=self.lengths.device) for side in zip(*moved, strict=True))
            for kind in self._kinds.values():
                for states in kind.prompt.flatten(0, 1):
                    states[to] = states[source]
                kind.prompt_positions[to] = kind.prompt_positions[source]
            self.prompt_lengths[to] = self.prompt_lengths[source]
        new_slot = {source: to for to, source in enumerate(kept)}
        self.host_prompt_lengths = [self.host_prompt_lengths[slot] for slot in kept]
        self.host_prompt_of_row = [new_slot[slot] for slot in self.host_prompt_of_row]
        rows = len(self.host_prompt_of_row)
        self.prompt_of_row[:rows] = torch.tensor(self.host_prompt_of_row, dtype=torch.long, device=self.lengths.device)
        self._arrange()

    def _arrange(self) -> None:
        """Rows as cells of a rectangle [prompts, group], so that a group reads its prompt in one matrix product."""
        rows, prompts = self.host_prompt_of_row, len(self.host_prompt_lengths)
        members: list[list[int]] = [[] for _ in range(prompts)]
        for row, prompt in enumerate(rows):
            members[prompt].append(row)
        self.group = max(map(len, members), default=0)
        self.ordered = rows == [prompt for prompt in range(prompts) for _ in range(self.group)]
        if self.ordered or not rows:
            return
        row_of_cell, cell_of_row = [0] * (prompts * self.group), [0] * len(rows)
        for prompt, group in enumerate(members):
            for place, row in enumerate(group):
                cell = prompt * self.group + place
                row_of_cell[cell], cell_of_row[row] = row, cell
        # an empty cell repeats row 0, and is never read back
        self._row_of_cell[: len(row_of_cell)] = torch.tensor(row_of_cell, device=self.lengths.device)
        self._cell_of_row[: len(rows)] = torch.tensor(cell_of_row, device=self.lengths.device)

    # ---- one step

    def extent(self, length_step: int = 1) -> Extent:
        """What the next step reads, own tokens rounded up to a multiple of length_step."""
        lengths, prompts = self.host_lengths, self.host_prompt_lengths
        length, width = min(-(-(max(lengths) + 1) // length_step) * length_step, self.max_length), max(prompts)
        aligned = min(lengths) + 1 == length and min(prompts) == width
        return Extent(len(lengths), len(prompts), self.group, self.ordered, width, length, aligned)

    def begin(self, extent: Extent) -> Int[Tensor, " B"]:
        """Prepare masks and places for one more token of every row; the tokens' positions."""
        self._extent = extent
        lengths = self.lengths[: extent.rows]
        prompt_of_row = self.prompt_of_row[: extent.rows]
        positions = self.prompt_lengths[prompt_of_row] + lengths.clamp(max=self.max_length - 1)
        self._places = {window: lengths % kind.ring for window, kind in self._kinds.items()}
        self._masks = {window: self._mask(kind, extent, positions, prompt_of_row) for window, kind in self._kinds.items()}
        return positions

    def end(self) -> None:
        """Every layer has seen the token: the device's count goes on. The host's goes on in `advance`."""
        self.lengths[: self._extent.rows] += 1

    def advance(self) -> None:
        """A step was made."""
        self.host_lengths = [length + 1 for length in self.host_lengths]

    def _mask(self, kind: _Kind, extent: Extent, positions: Tensor, prompt_of_row: Tensor) -> Float[Tensor, "B 1 1 PL"] | None:
        """0 where a row may read, -inf elsewhere, over [its prompt ; itself]; None where it may read everything there."""
        width, length = min(extent.prompt_width, kind.prompt_width), min(extent.length, kind.ring)
        crossing = kind.window is not None and extent.prompt_width + extent.length > kind.window
        if extent.aligned and not crossing:
            return None
        prompt_positions = kind.prompt_positions[prompt_of_row, :width]  # (B, P)
        oldest = -1 if kind.window is None else (positions[:, None] - kind.window).clamp(min=-1)
        to_prompt = prompt_positions > oldest
        # a ring that has gone round holds the last `ring` tokens, all of them inside the window
        to_own = self._columns[:length] <= self.lengths[: extent.rows, None]
        allowed = torch.cat([to_prompt, to_own], -1)
        return torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, -torch.inf)[:, None, None]

    def attend(
        self, layer: int, scaling: float, query: Float[Tensor, "B H D"], key: Float[Tensor, "B K D"], value: Float[Tensor, "B K D"]
    ) -> Float[Tensor, "B H D"]:
        """Remember the token's key and value, and read. One softmax over both parts' scores, float32 throughout."""
        kind, extent = self._kind_of[layer], self._extent
        index, rows, kv_heads, dim = kind.index[layer], len(query), key.shape[1], key.shape[2]
        place, mask = self._places[kind.window], self._masks[kind.window]
        own_k, own_v = kind.own[0, index], kind.own[1, index]
        own_k[self._all_rows[:rows], :, place], own_v[self._all_rows[:rows], :, place] = key, value
        length, width = min(extent.length, kind.ring), min(extent.prompt_width, kind.prompt_width)
        own_k, own_v = own_k[:rows, :, :length], own_v[:rows, :, :length]
        prompt_k, prompt_v = kind.prompt[:, index, : extent.prompts, :, :width]
        states = query.view(rows, kv_heads, -1, dim)  # (B, K, R, D)
        prompt_scores = self._to_rows(float32_product(self._to_cells(states), prompt_k.transpose(2, 3)))  # (B, K, R, P)
        own_scores = float32_product(states, own_k.transpose(2, 3))  # (B, K, R, L)
        scores = torch.cat([prompt_scores, own_scores], -1)
        scores = scores.mul_(scaling) if mask is None else torch.add(mask, scores, alpha=scaling)
        weights = scores.softmax(-1).to(query.dtype)
        out = float32_product(weights[..., width:], own_v)
        out += self._to_rows(float32_product(self._to_cells(weights[..., :width]), prompt_v))
        return out.to(query.dtype).view(rows, -1, dim)

    def _to_cells(self, states: Float[Tensor, "B K R X"]) -> Float[Tensor, "N K GR X"]:
        extent = self._extent
        if not extent.ordered:
            states = states[self._row_of_cell[: extent.prompts * extent.group]]
        cells: Tensor = states.unflatten(0, (extent.prompts, extent.group)).transpose(1, 2).flatten(2, 3)
        return cells

    def _to_rows(self, states: Float[Tensor, "N K GR X"]) -> Float[Tensor, "B K R X"]:
        extent = self._extent
        cells: Tensor = states.unflatten(2, (extent.group, -1)).transpose(1, 2).flatten(0, 1)
        return cells if extent.ordered else cells[self._cell_of_row[: extent.rows]]


class _Prefill:
    """Where a prefill pass leaves its prompts' keys and values."""

    def __init__(self, kind_of: Sequence[_Kind], lengths: Int[Tensor, " n"], first: int) -> None:
        self._kind_of, self._lengths, self._first = kind_of, lengths, first

    def __call__(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self._kind_of[layer].store_prompts(layer, keys, values, self._lengths, self._first)
