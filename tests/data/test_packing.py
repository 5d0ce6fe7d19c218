"""Bins: by hand, never too full, nothing lost, and few of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_grpo.data.packing import first_fit_decreasing


def every_cut(items: Sequence[int]) -> Iterator[list[list[int]]]:
    """All partitions of a set."""
    if not items:
        yield []
        return
    for cut in every_cut(items[1:]):
        yield [[items[0]], *cut]
        for index, piece in enumerate(cut):
            yield [*cut[:index], [items[0], *piece], *cut[index + 1 :]]


@pytest.mark.parametrize(
    ("sizes", "room", "expected"),
    [
        ([], 10, []),
        ([4, 4, 4], 12, [(0, 1, 2)]),
        ([4, 4, 4], 11, [(0, 1), (2,)]),  # of equals the first come first
        ([2, 7, 3, 8], 10, [(0, 3), (1, 2)]),  # 8 + 2 and 7 + 3, where as they come three are needed: 2 + 7, 3, 8
        ([5, 99, 5], 10, [(1,), (0, 2)]),  # too large alone, and nothing beside it
        ([99, 0], 10, [(0,), (1,)]),
        ([0, 3, 0], 3, [(0, 1, 2)]),
        ([3, 0], -1, [(0,), (1,)]),  # a prompt alone was already too much
    ],
)
def test_bins_by_hand(sizes: list[int], room: int, expected: list[tuple[int, ...]]) -> None:
    assert first_fit_decreasing(sizes, room) == expected


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(-5, 60))
def test_bins_hold_everything_once_and_no_more_than_their_room(sizes: list[int], room: int) -> None:
    bins = first_fit_decreasing(sizes, room)
    assert sorted(index for indices in bins for index in indices) == list(range(len(sizes)))
    assert all(len(indices) == 1 or sum(sizes[index] for index in indices) <= room for indices in bins)
    assert all(list(indices) == sorted(indices) for indices in bins)
    assert bins == first_fit_decreasing(sizes, room)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(40, 90))
def test_bins_are_few(sizes: list[int], room: int) -> None:
    fewest = min(len(cut) for cut in every_cut(range(len(sizes))) if all(sum(sizes[index] for index in part) <= room for part in cut))
    assert len(first_fit_decreasing(sizes, room)) <= 11 / 9 * fewest + 6 / 9


@given(st.lists(st.integers(1, 40), min_size=2, max_size=60), st.integers(40, 90))
def test_all_bins_but_one_are_more_than_half_full(sizes: list[int], room: int) -> None:
    filled = sorted(sum(sizes[index] for index in indices) for indices in first_fit_decreasing(sizes, room))
    assert all(2 * size > room for size in filled[1:])
