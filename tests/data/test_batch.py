from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pad

from gemma_grpo.data.batch import GroupBatch, PolicyBatch, Slot, pad_groups, pad_rollouts, pad_sequences, pad_values
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
    (slot,) = left.slots(None)
    piece = left.piece(slot)
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


def places(slots: Iterable[Slot]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(slot.rows, slot.completions) for slot in slots]


def test_pieces_hold_whole_groups_trimmed_to_their_own_longest():
    batch = policy_batch()
    slots = batch.slots(9)  # the groups have 3 + 2 + 4 = 9 and 2 + 2 + 0 = 4 tokens
    assert places(slots) == [((0,), BOTH), ((1,), BOTH)]
    first, second = (batch.piece(slot) for slot in slots)
    assert first.prompt_ids.tolist() == [[2, 11, 12]]
    assert second.prompt_ids.tolist() == [[2, 21]]
    assert first.completion_ids.shape == (1, 2, 4)
    assert second.completion_ids.shape == second.completion_mask.shape == second.sampling_logprobs.shape == (1, 2, 2)
    assert second.ref_logprobs.tolist() == [[[-41.0, -106.0], [0.0, 0.0]]]
    assert second.advantages.tolist() == [[2.0, -2.0]]
    assert first.old_logprobs is None
    assert (first.num_tokens, second.num_tokens) == (9, 4)


BOTH = (0, 1)


@pytest.mark.parametrize(
    ("token_budget", "expected"),
    [
        (None, [(BOTH, BOTH)]),
        (13, [(BOTH, BOTH)]),
        (12, [((0,), BOTH), ((1,), BOTH)]),
        (9, [((0,), BOTH), ((1,), BOTH)]),
        (8, [((0,), (1,)), ((0,), (0,)), ((1,), BOTH)]),  # the first group, 9, one completion at a time: 3 + 4 and 3 + 2
        (4, [((0,), (1,)), ((0,), (0,)), ((1,), BOTH)]),  # a completion that alone has 7 is a piece all the same
        (3, [((0,), (1,)), ((0,), (0,)), ((1,), (0,)), ((1,), (1,))]),  # 7, 5, and 2 + 2 and 2 + 0
        (1, [((0,), (1,)), ((0,), (0,)), ((1,), (0,)), ((1,), (1,))]),
    ],
)
def test_pieces_by_hand(token_budget, expected):
    assert places(policy_batch().slots(token_budget)) == expected


def sized(lengths: list[tuple[int, list[int]]]) -> GroupBatch:
    """Prompts and completions of these lengths; every token is another number, so that none can stand in another's place."""
    numbers = iter(range(3, 100_000))

    def tokens(count: int) -> list[int]:
        return [next(numbers) for _ in range(count)]

    return pad_groups([tokens(prompt) for prompt, _ in lengths], [[tokens(length) for length in group] for _, group in lengths])


@pytest.mark.parametrize(
    ("lengths", "token_budget", "expected"),
    [
        # long prompts beside short ones: 3 x 520 + 3 x 40 = 1680 real tokens, 3120 as one rectangle
        ([(500, [10, 10]), (20, [10, 10])] * 3, 1680, [((0, 1, 2, 3, 4, 5), BOTH)]),
        ([(500, [10, 10]), (20, [10, 10])] * 3, 1090, [((0, 1, 2), BOTH), ((3, 4, 5), BOTH)]),  # 520 + 520 + 40, 520 + 40 + 40
        # a long completion beside short ones: 4 + 900 + 5 + 5
        ([(4, [900, 5, 5])], 914, [((0,), (0, 1, 2))]),
        # a group cut by its completions: 4 + 50 + 6, 4 + 49 + 5 and 4 + 4
        ([(4, [50, 5, 49, 4, 6])], 61, [((0,), (0, 4)), ((0,), (1, 2)), ((0,), (3,))]),
        # equal lengths stay in their order
        ([(8, [4, 4])] * 5, 32, [(BOTH, BOTH), ((2, 3), BOTH), ((4,), BOTH)]),
    ],
)
def test_pieces_are_filled_with_real_tokens(lengths, token_budget, expected):
    assert places(sized(lengths).slots(token_budget)) == expected


def test_whole_groups_stay_together_however_large_they_are():
    assert places(policy_batch().slots(1, whole_groups=True)) == [((0,), BOTH), ((1,), BOTH)]
    assert places(policy_batch().slots(13, whole_groups=True)) == [(BOTH, BOTH)]


def test_a_part_of_a_group_keeps_its_prompt_and_its_own_columns():
    piece = policy_batch().piece(Slot((0,), (0,)))
    assert piece.prompt_ids.tolist() == [[2, 11, 12]]
    assert piece.completion_ids.tolist() == [[[31, 106]]]
    assert piece.advantages.tolist() == [[1.0]]
    assert piece.completion_positions.tolist() == [[[3, 4]]]


def test_a_slot_within_a_slot_counts_from_the_whole_batch():
    assert Slot((1, 4, 7), (0, 2, 5)).inner(Slot((0, 2), (1,))) == Slot((1, 7), (2,))


LENGTHS = st.integers(1, 4).flatmap(
    lambda group: st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(0, 30), min_size=group, max_size=group)), min_size=1, max_size=7
    )
)


@given(LENGTHS, st.integers(1, 400), st.booleans())
def test_a_piece_equals_the_batch_of_its_own_groups(lengths, token_budget, whole_groups):
    batch = sized(lengths)
    prompts = [ids[mask].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
    completions = [[batch.completion_ids[n, g, :length].tolist() for g, length in enumerate(row)] for n, (_, row) in enumerate(lengths)]
    for slot in batch.slots(token_budget, whole_groups=whole_groups):
        alone = pad_groups([prompts[n] for n in slot.rows], [[completions[n][g] for g in slot.completions] for n in slot.rows])
        for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "prompt_positions", "completion_positions"):
            assert getattr(batch.piece(slot), name).tolist() == getattr(alone, name).tolist(), name


@given(LENGTHS, st.integers(1, 400), st.booleans())
def test_pieces_fit_and_fill_every_place_once(lengths, token_budget, whole_groups):
    batch = sized(lengths)
    num_prompts, group = batch.completion_ids.shape[:2]
    counts, tokens = torch.zeros(num_prompts, group), torch.full(batch.completion_ids.shape, -1)
    sizes = []
    for slot in batch.slots(token_budget, whole_groups=whole_groups):
        piece = batch.piece(slot)
        rows, part = piece.completion_ids.shape[:2]
        sizes.append(piece.num_tokens)
        assert sizes[-1] <= token_budget or rows == 1 == (1 if whole_groups else part)
        assert part == group or (rows == 1 and not whole_groups)
        # a prompt is read again only where its group alone is too large
        alone = batch.piece(Slot(slot.rows, tuple(range(group))))
        assert part == group or alone.num_tokens > token_budget
        for n in slot.rows:
            counts[n, list(slot.completions)] += 1
        slot.put(piece.completion_ids, tokens)
    assert counts.eq(1).all()
    assert sizes == sorted(sizes, reverse=True)
    assert torch.equal(tokens[batch.completion_mask], batch.completion_ids[batch.completion_mask])
    assert batch.slots(token_budget, whole_groups=whole_groups) == batch.slots(token_budget, whole_groups=whole_groups)


@given(LENGTHS, st.integers(1, 400))
def test_wider_padding_changes_no_cut(lengths, token_budget):
    batch = sized(lengths)
    ids, masks = (batch.prompt_ids, batch.completion_ids), (batch.prompt_mask, batch.completion_mask)
    (prompt_ids, completion_ids), (prompt_mask, completion_mask) = ([pad(value, (0, 99)) for value in both] for both in (ids, masks))
    wider = GroupBatch(prompt_ids.roll(99, -1), prompt_mask.roll(99, -1), completion_ids, completion_mask)
    assert wider.slots(token_budget) == batch.slots(token_budget)
    assert wider.num_tokens == batch.num_tokens == sum(prompt + sum(group) for prompt, group in lengths)


@given(LENGTHS, st.integers(1, 400))
def test_no_more_tokens_are_read_than_in_rectangles_cut_as_they_come(lengths, token_budget):
    """The cut there would be without packing: consecutive groups, then completions, each piece padded to its longest.

    Of a group of up to five completions none makes fewer pieces; of larger ones there are exceptions, by the bound in packing.py.
    """
    batch = sized(lengths)
    packed = sum(batch.piece(slot).num_tokens for slot in batch.slots(token_budget))
    assert packed <= sum(padded(lengths, rows, part) for rows, part in consecutive(lengths, token_budget))


def padded(lengths: list[tuple[int, list[int]]], rows: range, part: range) -> int:
    longest = max(lengths[n][1][g] for n in rows for g in part)
    return len(rows) * (max(lengths[n][0] for n in rows) + len(part) * max(1, longest))


def consecutive(lengths: list[tuple[int, list[int]]], budget: int) -> list[tuple[range, range]]:
    everything = range(len(lengths[0][1]))
    pieces: list[tuple[range, range]] = []
    for rows in runs(len(lengths), lambda rows: padded(lengths, rows, everything) <= budget):
        if len(rows) > 1:
            pieces.append((rows, everything))
        else:
            pieces += [(rows, part) for part in runs(len(everything), lambda part, rows=rows: padded(lengths, rows, part) <= budget)]
    return pieces


def runs(count: int, fits: Callable[[range], bool]) -> list[range]:
    found: list[range] = []
    for n in range(count):
        if found and fits(range(found[-1].start, n + 1)):
            found[-1] = range(found[-1].start, n + 1)
        else:
            found.append(range(n, n + 1))
    return found


def test_values_of_a_piece_return_to_their_place():
    scores, logprobs = torch.zeros(2, 2), torch.zeros(2, 2, 4)
    slot = Slot((1,), (0,))
    slot.put(torch.tensor([[7.0]]), scores)
    slot.put(torch.tensor([[[5.0, 6.0]]]), logprobs)  # narrower than the batch
    assert scores.tolist() == [[0, 0], [7, 0]]
    assert logprobs[1].tolist() == [[5, 6, 0, 0], [0, 0, 0, 0]]
    assert logprobs[0].count_nonzero() == 0


def test_moving_a_batch_keeps_its_values_and_its_absent_fields():
    moved = policy_batch().to("cpu")
    assert isinstance(moved, PolicyBatch)
    assert moved.completion_ids.tolist() == policy_batch().completion_ids.tolist()
    assert moved.old_logprobs is None
