"""Products over blocks against the definition: dense scores over the whole packed row, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma_grpo.model.grouped import Block, PackedAttention, blocks_of, within_window

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
CPU = torch.device("cpu")


def dense(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scaling: float) -> Tensor:
    """[T H D] from [T H D] and [T K D], one softmax over all that a token may read."""
    key, value = (states.repeat_interleave(HEADS // KEY_HEADS, 1) for states in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -math.inf).softmax(-1), value)


def who_reads_whom(prompts: list[int], completions: list[list[int]], window: int | None) -> Tensor:
    """[T T] over the packed row, from who each token is and its position: its own sequence's tokens, and its prompt's."""
    owner: list[int] = []
    prompt: list[int] = []
    position: list[int] = []
    for n, length in enumerate(prompts):
        owner += [n] * length
        prompt += [n] * length
        position += range(length)
    for n, group in enumerate(completions):
        for g, length in enumerate(group):
            owner += [100 * (n + 1) + g] * length
            prompt += [n] * length
            position += range(prompts[n], prompts[n] + length)
    owners, prompt_of, positions = torch.tensor(owner), torch.tensor(prompt), torch.tensor(position)
    related = (owners[:, None] == owners) | (prompt_of[:, None] == owners)
    return related & within_window(positions, positions, window)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    prompts=st.lists(st.sampled_from([1, 4, 4, 4, 9, 13]), min_size=1, max_size=3),
    completions=st.lists(st.lists(st.integers(1, 9), max_size=16), min_size=3, max_size=3),
    window=st.sampled_from([None, 1, 3, 8, 40]),
    limit=st.sampled_from([1, 20, 100, 10**6]),
    scaling=st.sampled_from([0.25, 28**-0.5]),
)
def test_blocks_of_any_size_give_what_the_definition_gives(
    prompts: list[int], completions: list[list[int]], window: int | None, limit: int, scaling: float
) -> None:
    groups = completions[: len(prompts)]
    tokens, generator = sum(prompts) + sum(map(sum, groups)), torch.Generator().manual_seed(sum(prompts) + limit)
    exact = [torch.randn(tokens, heads, WIDTH, generator=generator, dtype=torch.float64) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    cotangent = torch.randn(exact[0].shape, generator=generator, dtype=torch.float64)
    plain = [states.clone().requires_grad_() for states in exact]
    expected = dense(*plain, who_reads_whom(prompts, groups, window), scaling)
    gradients = torch.autograd.grad((expected * cotangent).sum(), plain)
    fast = [states.float().requires_grad_() for states in exact]
    blocks = blocks_of(prompts, groups, window, CPU, limit=limit)
    found = PackedAttention.apply(*fast, blocks, scaling)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad((found * cotangent.float()).sum(), fast), gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


def test_a_block_holds_no_more_scores_than_its_limit_and_reads_no_key_beyond_the_window() -> None:
    # a prompt of 100 and completions of 30, 10 and 20, window 16: of the prompt, completions see the last 15 at most
    blocks = blocks_of([100], [[30, 10, 20]], 16, CPU, limit=400)
    sizes = [(*block.shape, *block.mask.shape) for block in blocks]
    assert all(sequences * queries * keys <= 400 for sequences, queries, _, keys in sizes)
    assert all(keys <= queries + 15 for _, queries, _, keys in sizes)
    assert sum(block.queries.real.numel() if block.queries.real is not None else math.prod(block.shape) for block in blocks) == 160


def test_equal_completions_stand_in_one_block_without_padding() -> None:
    prompt, group = blocks_of([5], [[4, 4, 4]], None, CPU, limit=10**6)
    assert (prompt.shape, group.shape) == ((1, 5), (3, 4))
    assert (prompt.queries.places, group.queries.places) == (slice(0, 5), slice(5, 17))
    assert group.mask.tolist() == [[0] * 5 + [0 if key <= query else -math.inf for key in range(4)] for query in range(4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_once(dtype: torch.dtype) -> None:
    # scores and sums are float32: what is left is the rounding of weights, gradients and results to 16 bits
    prompts, groups, generator = [12, 3], [[5, 9], [1, 7]], torch.Generator().manual_seed(0)
    inputs = [torch.randn(37, heads, WIDTH, generator=generator).to(dtype) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    cotangent = torch.randn(37, HEADS, WIDTH, generator=generator).to(dtype)
    plain, fast = ([states.to(kind).requires_grad_() for states in inputs] for kind in (torch.float64, dtype))
    expected = dense(*plain, who_reads_whom(prompts, groups, 6), 0.25)
    found = PackedAttention.apply(*fast, blocks_of(prompts, groups, 6, CPU, limit=60), 0.25)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert (found.double() - expected).norm() < eps * expected.norm()
    gradients = torch.autograd.grad((expected * cotangent.double()).sum(), plain)
    for mine, theirs in zip(torch.autograd.grad((found * cotangent).sum(), fast), gradients, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - theirs).norm() < 2 * eps * theirs.norm()


def rectangle(blocks: list[Block]) -> int:
    """Scores of a head over all blocks, padding included."""
    return sum(math.prod(block.shape) * block.mask.shape[1] for block in blocks)


def test_one_long_completion_does_not_make_the_others_as_long() -> None:
    # by hand: the prompt 99^2; 15 completions of 17, padded to one another alone, see 99 + 17 keys; the long one 99 + 512
    alone = 99**2 + 512 * (99 + 512)
    for lengths in ([512, *[17] * 15], [*[17] * 7, 512, *[17] * 8]):
        assert rectangle(blocks_of([99], [lengths], None, CPU, limit=10**7)) == alone + 15 * 17 * (99 + 17)
    # 29 and 30 are padded to the longest, 32: that costs less than another block
    nearly = blocks_of([99], [[29, 32, 30]], None, CPU, limit=10**7)
    assert rectangle(nearly) == 99**2 + 3 * 32 * (99 + 32)


def test_prompts_of_one_length_share_a_block_wherever_they_stand() -> None:
    blocks = blocks_of([3, 5, 3], [[2], [2], [4]], None, CPU, limit=10**7)
    assert [(block.shape, block.shared.shape) for block in blocks] == [((3, 5), (1, 0)), ((2, 4), (2, 3)), ((1, 2), (1, 5))]


def test_a_window_cuts_what_its_queries_would_not_see() -> None:
    # 512 tokens, window 128: the first 128 queries have 128 keys, the others 127 more; one block would have 512^2 scores
    assert rectangle(blocks_of([512], [[]], 128, CPU, limit=10**7)) == 128 * 128 + 3 * 128 * (127 + 128)


@pytest.mark.parametrize(("prompts", "groups", "window"), [([300, 20], [[150, 40, 170], [200]], 64), ([99], [[17, 400, 17, 17]], None)])
def test_long_sequences_give_what_the_definition_gives(prompts: list[int], groups: list[list[int]], window: int | None) -> None:
    tokens, generator = sum(prompts) + sum(map(sum, groups)), torch.Generator().manual_seed(0)
    inputs = [torch.randn(tokens, heads, WIDTH, generator=generator, requires_grad=True) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    expected = dense(*inputs, who_reads_whom(prompts, groups, window), 0.25)
    found = PackedAttention.apply(*inputs, blocks_of(prompts, groups, window, CPU, limit=10**7), 0.25)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn(found.shape, generator=generator)
    gradients = (torch.autograd.grad((out * cotangent).sum(), inputs) for out in (found, expected))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
