"""What a rollout holds at a time, worked out by hand and as laws."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gemma_grpo.room import Room


def test_whole_groups_then_single_completions_then_slots_for_waiting_prompts() -> None:
    # four prompts of up to 21 tokens with four completions of 12: a group takes 21 + 4 x 12 = 69
    assert Room.of(4, 21, 4, 12, None) == Room(4, 21, 16, 12)
    assert Room.of(4, 21, 4, 12, 276) == Room(4, 21, 16, 12)
    assert Room.of(4, 21, 4, 12, 275) == Room(4, 21, 12, 12)  # three groups, and 68 tokens for slots: one prompt is all that waits
    assert Room.of(4, 21, 4, 12, 158) == Room(2, 21, 8, 12)  # two groups and 20 tokens: no slot
    assert Room.of(4, 21, 4, 12, 159) == Room(3, 21, 8, 12)
    assert Room.of(4, 21, 4, 12, 45) == Room(1, 21, 2, 12)
    assert Room.of(4, 21, 4, 12, 1) == Room(1, 21, 1, 12)


@given(st.integers(1, 20), st.integers(1, 300), st.integers(1, 12), st.integers(1, 300), st.integers(1, 40_000))
def test_no_more_is_held_than_allowed_unless_one_completion_needs_it(prompts: int, width: int, group: int, length: int, limit: int) -> None:
    room = Room.of(prompts, width, group, length, limit)
    assert room.tokens <= max(limit, width + length)
    assert 1 <= room.prompts <= prompts
    assert 1 <= room.rows <= prompts * group
    assert room.rows % group == 0 or room.prompts == 1
    assert Room.of(prompts, width, group, length, limit + 1).rows >= room.rows
