"""Decoding against the full forward pass: every token, whichever rows come and go, across the sliding window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.data.batch import pad_groups
from gemma_grpo.model.attention import GroupLayout
from gemma_grpo.model.decode import Decoder, decode_cache
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.kv_cache import DecodeCache

LAYERS = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 28,  # not the head's width, as in the 27b: the default scale would be wrong
}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def models(new_gemma: Callable[..., Gemma]) -> dict[int, Gemma]:
    """By window; an adapter on every linear layer."""
    lora = LoraSettings(target_modules=ALL)
    return {window: new_gemma(sliding_window=window, lora=lora, moved=0.05, **LAYERS) for window in (1, 4, 16)}


@dataclass
class Row:
    """A completion being read: its prompt, all of its tokens, and how many were read."""

    prompt: int
    tokens: list[int]
    read: int = 0
    seen: list[Tensor] = field(default_factory=list)


class Reading:
    """Drives a cache as an engine does, with tokens that are known beforehand."""

    def __init__(self, model: Gemma, prompts: Sequence[list[int]], rows: int, length: int, length_step: int) -> None:
        self.model, self.prompts, self.length_step = model, prompts, length_step
        width = max(map(len, prompts))
        self.cache: DecodeCache = decode_cache(model, prompts=len(prompts), prompt_width=width, rows=rows, length=length)
        self.decoder = Decoder(model, width + length)
        self.slots: list[int] = []
        self.rows: list[Row] = []

    def prefill(self, prompts: list[int]) -> None:
        batch = pad_groups([self.prompts[prompt] for prompt in prompts], [[()] for _ in prompts])
        self.model.hidden_states(GroupLayout(batch, keep_prompt_kv=self.cache.prefilling(batch.prompt_mask.sum(-1))))
        self.slots += prompts

    def add(self, rows: list[Row]) -> None:
        self.rows += rows
        self.cache.add_rows([self.slots.index(row.prompt) for row in rows])

    def step(self) -> None:
        """Rows at their end read garbage, as those of a GPU do that have stopped since the engine last looked."""
        ids = torch.tensor([row.tokens[row.read] if row.read < len(row.tokens) else 300 for row in self.rows])
        hidden = self.decoder.step(ids, self.cache, self.cache.extent(self.length_step))
        self.cache.advance()
        for row, state in zip(self.rows, hidden, strict=True):
            if row.read < len(row.tokens):
                row.seen.append(state)
                row.read += 1

    def drop(self, gone: Callable[[Row], bool]) -> None:
        """The rows behind fill the holes; prompts that nobody reads go too, in another order than they came."""
        left = [index for index, row in enumerate(self.rows) if not gone(row)]
        kept = sorted(left, key=lambda index: (index * 7) % 5)
        kept = [index for index in kept if index < len(kept)] + [index for index in kept if index >= len(kept)]
        order = _settled(kept)
        self.cache.keep_rows(order)
        self.rows = [self.rows[index] for index in order]
        prompts = _settled([slot for slot, prompt in enumerate(self.slots) if any(row.prompt == prompt for row in self.rows)])
        if len(prompts) < len(self.slots):
            self.cache.keep_prompts(prompts)
            self.slots = [self.slots[slot] for slot in prompts]


def _settled(kept: list[int]) -> list[int]:
    """Those below the new count stay where they are, the others fill the holes."""
    order: list[Any] = [index if index in kept else None for index in range(len(kept))]
    behind = iter([index for index in kept if index >= len(kept)])
    return [next(behind) if index is None else index for index in order]


def expected(model: Gemma, prompt: list[int], tokens: list[int]) -> Tensor:
    """Hidden states of a completion's tokens, [C D], by the model's own forward pass over prompt and completion."""
    layout = GroupLayout(pad_groups([[*prompt, *tokens]], [[()]]))
    return model.hidden_states(layout)[len(prompt) :]


def assert_read_right(model: Gemma, prompts: Sequence[list[int]], rows: Sequence[Row], tolerance: float = 2e-5) -> None:
    for row in rows:
        assert row.read == len(row.tokens)
        torch.testing.assert_close(torch.stack(row.seen), expected(model, prompts[row.prompt], row.tokens), rtol=0, atol=tolerance)


def words(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(107, 363, (count,), generator=generator).tolist()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    prompt_lengths=st.lists(st.integers(1, 11), min_size=1, max_size=4),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=6),
    capacity=st.integers(1, 7),
    window=st.sampled_from([1, 4, 16]),
    length_step=st.sampled_from([1, 1, 5]),
    patience=st.sampled_from([1, 1, 3]),
    role=st.sampled_from(["policy", "reward", "reference"]),
)
def test_every_token_is_read_as_in_one_full_forward_whoever_comes_and_goes(
    models: dict[int, Gemma],
    prompt_lengths: list[int],
    lengths: list[int],
    capacity: int,
    window: int,
    length_step: int,
    patience: int,
    role: Any,
) -> None:
    """Each prompt has one row of each of `lengths`; `capacity` rows at a time, a finished one replaced after `patience` steps."""
    model, generator = models[window], torch.Generator().manual_seed(sum(prompt_lengths) + 31 * sum(lengths) + capacity)
    prompts = [[2, *words(generator, length - 1)] for length in prompt_lengths]
    rows = [Row(n, words(generator, length)) for n in range(len(prompts)) for length in lengths]
    with torch.no_grad(), model.role(role):
        reading, waiting, steps = Reading(model, prompts, capacity, max(lengths), length_step), list(rows), 0
        while waiting or reading.rows:
            reading.drop(lambda row: row.read == len(row.tokens))
            new = [waiting.pop(0) for _ in range(min(len(waiting), capacity - len(reading.rows)))]
            fresh = sorted({row.prompt for row in new} - set(reading.slots), reverse=True)
            if fresh:
                reading.prefill(fresh)
            reading.add(new)
            for _ in range(patience if reading.rows else 0):
                reading.step()
                steps += 1
            reading.drop(lambda row: row.read == len(row.tokens))
        assert_read_right(model, prompts, rows)


def test_a_place_that_is_taken_again_shows_nothing_of_its_former_row(models: dict[int, Gemma]) -> None:
    # one row of twelve tokens fills its place, rings gone round; the next in the same place has two
    model, prompts = models[4], [[2, 150, 151], [2, 170]]
    first, second = Row(0, list(range(200, 212))), Row(1, [220, 221])
    with torch.no_grad(), model.role("policy"):
        reading = Reading(model, prompts, rows=1, length=12, length_step=1)
        for row in (first, second):
            reading.prefill([row.prompt])
            reading.add([row])
            for _ in row.tokens:
                reading.step()
            reading.drop(lambda _: True)
        assert_read_right(model, prompts, [first, second])


def test_sliding_layers_keep_what_their_window_reaches(models: dict[int, Gemma]) -> None:
    cache = decode_cache(models[4], prompts=2, prompt_width=11, rows=6, length=20)
    held = {window: (kind.prompt.shape, kind.own.shape) for window, kind in cache._kinds.items()}
    # [keys and values, layers, slots, key heads, tokens, head]: of a prompt all but the token itself can be inside the window
    assert held == {4: ((2, 2, 2, 2, 3, 16), (2, 2, 6, 2, 4, 16)), None: ((2, 1, 2, 2, 11, 16), (2, 1, 6, 2, 20, 16))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_read_nearly_what_the_forward_pass_reads(new_gemma: Callable[..., Gemma], dtype: torch.dtype) -> None:
    settings_ = {"sliding_window": 4, "moved": 0.05, **LAYERS}
    exact, model = new_gemma(**settings_), new_gemma(dtype=dtype, **settings_)
    prompts, generator = [[2, 150, 151, 152, 153], [2, 170]], torch.Generator().manual_seed(0)
    rows = [Row(n, words(generator, length)) for n in range(2) for length in (3, 9)]
    with torch.no_grad(), model.role("policy"), exact.role("policy"):
        reading = Reading(model, prompts, rows=4, length=9, length_step=1)
        reading.prefill([0, 1])
        reading.add(rows)
        for _ in range(9):
            reading.step()
        for row in rows:
            truth, grouped = (expected(one, prompts[row.prompt], row.tokens) for one in (exact, model))
            assert row.seen[0].dtype == dtype
            # as far from the exact numbers as the forward pass in the same format is, give or take
            assert (torch.stack(row.seen).float() - truth).norm() < 1.5 * (grouped.float() - truth).norm() + 0.01 * truth.norm()
