from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma_grpo.data.batch import GroupBatch, PolicyBatch, pad_groups, pad_rollouts, pad_sequences, pad_values
from gemma_grpo.types import Completion, Prompt, RolloutGroup

PROMPTS = [[2, 11, 12], [2, 21]]
COMPLETIONS = [[[31, 106], [32, 33, 34, 106]], [[41, 106], []]]


def rollout(prompt_ids: list[int], completions: list[list[int]]) -> RolloutGroup:
    prompt = Prompt("id", "test", ({"role": "user", "content": "x"},), tuple(prompt_ids), "conversation")
    return RolloutGroup(prompt, tuple(Completion("x", tuple(ids), (-1.0,) * len(ids), "stop") for ids in completions), 0)


def policy_batch() -> PolicyBatch:
    padded = pad_groups(PROMPTS, COMPLETIONS)
    return PolicyBatch(
        padded.prompt_ids,
        padded.prompt_mask,
        padded.completion_ids,
        padded.completion_mask,
        sampling_logprobs=padded.completion_ids.float(),
        advantages=torch.tensor([[1.0, -1.0], [2.0, -2.0]]),
        old_logprobs=None,
        ref_logprobs=-padded.completion_ids.float(),
    )


def test_padding_is_on_the_right_and_masked_out():
    ids, mask = pad_sequences([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


def test_empty_sequences_keep_one_masked_column():
    ids, mask = pad_sequences([[], []])
    assert ids.shape == (2, 1)
    assert not mask.any()


def test_groups_keep_their_structure():
    batch = pad_groups(PROMPTS, COMPLETIONS)
    assert batch.prompt_ids.tolist() == [[2, 11, 12], [2, 21, 0]]
    assert batch.completion_ids.tolist() == [[[31, 106, 0, 0], [32, 33, 34, 106]], [[41, 106, 0, 0], [0, 0, 0, 0]]]
    assert batch.completion_mask.sum(-1).tolist() == [[2, 4], [2, 0]]


def test_positions_count_real_tokens_from_bos_through_each_completion():
    batch = pad_groups(PROMPTS, COMPLETIONS)
    assert batch.prompt_positions.tolist() == [[0, 1, 2], [0, 1, 1]]
    completion = batch.completion_positions
    assert completion[0, 0, :2].tolist() == [3, 4]  # after the prompt's 3 tokens, in every completion of the group
    assert completion[0, 1].tolist() == [3, 4, 5, 6]
    assert completion[1, 0, :2].tolist() == [2, 3]  # after 2, not after the padded width


def test_a_wider_neighbour_changes_no_real_token_or_position():
    alone = pad_groups(PROMPTS[1:], COMPLETIONS[1:])
    beside = pad_groups(PROMPTS, COMPLETIONS)
    assert beside.prompt_ids[1][beside.prompt_mask[1]].tolist() == alone.prompt_ids[0][alone.prompt_mask[0]].tolist()
    real = beside.completion_mask[1]
    assert beside.completion_positions[1][real].tolist() == alone.completion_positions[0][alone.completion_mask[0]].tolist()


def test_padding_on_the_left_moves_no_position_and_is_trimmed_too():
    right = pad_groups(PROMPTS[:1], COMPLETIONS[:1])
    left = GroupBatch(
        torch.tensor([[0, 0, 2, 11, 12]]), torch.tensor([[False, False, True, True, True]]), right.completion_ids, right.completion_mask
    )
    assert left.prompt_positions[left.prompt_mask].tolist() == [0, 1, 2]
    assert left.completion_positions.tolist() == right.completion_positions.tolist()
    (piece,) = left.split(1)
    assert piece.prompt_ids.tolist() == [[2, 11, 12]]


def test_unequal_groups_are_refused_with_their_sizes():
    with pytest.raises(ValueError, match=r"sizes \[1, 2\]"):
        pad_groups(PROMPTS, [[[1]], [[1], [2]]])
    with pytest.raises(ValueError, match="2 prompts"):
        pad_groups(PROMPTS, [[[1]]])


def test_rollouts_carry_the_suffix_after_each_completions_own_tokens():
    batch = pad_rollouts([rollout(PROMPTS[0], COMPLETIONS[0])], suffix_ids=[107, 105])
    assert batch.completion_ids[0].tolist() == [[31, 106, 107, 105, 0, 0], [32, 33, 34, 106, 107, 105]]
    assert batch.completion_mask[0].sum(-1).tolist() == [4, 6]


def test_values_take_the_batchs_shape_with_zero_on_padding():
    batch = pad_groups(PROMPTS, COMPLETIONS)
    values = pad_values([[[-1.0, -2.0], [-1.0, -2.0, -3.0, -4.0]], [[-5.0, -6.0], []]], batch)
    assert values.shape == batch.completion_ids.shape
    assert values[0, 0].tolist() == [-1, -2, 0, 0]
    assert values[1, 1].tolist() == [0, 0, 0, 0]


def test_pieces_hold_whole_groups_in_order_trimmed_to_their_own_longest():
    first, second = policy_batch().split(1)
    assert first.prompt_ids.tolist() == [[2, 11, 12]]
    assert second.prompt_ids.tolist() == [[2, 21]]
    assert first.completion_ids.shape == (1, 2, 4)
    assert second.completion_ids.shape == second.completion_mask.shape == second.sampling_logprobs.shape == (1, 2, 2)
    assert second.ref_logprobs.tolist() == [[[-41.0, -106.0], [0.0, 0.0]]]
    assert second.advantages.tolist() == [[2.0, -2.0]]
    assert first.old_logprobs is None


SEQUENCE = st.lists(st.integers(3, 9), max_size=5)


@given(
    st.lists(st.tuples(SEQUENCE.map(lambda ids: [2, *ids]), st.lists(SEQUENCE, min_size=3, max_size=3)), min_size=1, max_size=5),
    st.integers(1, 5),
)
def test_a_piece_equals_the_batch_of_its_own_groups(groups, size):
    prompts, completions = [prompt for prompt, _ in groups], [completion for _, completion in groups]
    for number, piece in enumerate(pad_groups(prompts, completions).split(size)):
        rows = slice(number * size, (number + 1) * size)
        alone = pad_groups(prompts[rows], completions[rows])
        for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "prompt_positions", "completion_positions"):
            assert getattr(piece, name).tolist() == getattr(alone, name).tolist(), name


@pytest.mark.parametrize("size", [1, 2, 3])
def test_splitting_loses_and_doubles_no_token(size):
    batch = policy_batch()
    pieces = list(batch.split(size))
    assert sum(int(piece.completion_mask.sum()) for piece in pieces) == int(batch.completion_mask.sum()) == 8
    tokens = torch.cat([piece.completion_ids[piece.completion_mask] for piece in pieces])
    assert tokens.tolist() == batch.completion_ids[batch.completion_mask].tolist()


def test_moving_a_batch_keeps_its_values_and_its_absent_fields():
    moved = policy_batch().to("cpu")
    assert isinstance(moved, PolicyBatch)
    assert moved.completion_ids.tolist() == policy_batch().completion_ids.tolist()
    assert moved.old_logprobs is None
