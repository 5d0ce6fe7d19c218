"""Cuts by length: what they cost by hand, against every other cut there is, and against the cut in the order things came."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_grpo.data.packing import PIECE_TOKENS, Box, cheapest_cut

GROUP = 3


def tokens(count: int, box: Box) -> int:
    """Of whole groups."""
    return box.tokens(count, GROUP)


def around(boxes: Sequence[Box]) -> Box:
    return Box(min(box.first for box in boxes), max(box.stop for box in boxes), max(box.longest for box in boxes))


def cost(boxes: Sequence[Box], pieces: Sequence[Sequence[int]]) -> int:
    return sum(tokens(len(piece), around([boxes[n] for n in piece])) + PIECE_TOKENS for piece in pieces)


def consecutive(boxes: Sequence[Box], budget: int) -> list[list[int]]:
    """As they come, as many at a time as fit."""
    pieces: list[list[int]] = []
    for n in range(len(boxes)):
        if pieces and tokens(len(pieces[-1]) + 1, around([boxes[m] for m in [*pieces[-1], n]])) <= budget:
            pieces[-1].append(n)
        else:
            pieces.append([n])
    return pieces


def every_cut(items: Sequence[int]) -> Iterator[list[list[int]]]:
    """All partitions of a set."""
    if not items:
        yield []
        return
    for cut in every_cut(items[1:]):
        yield [[items[0]], *cut]
        for index, piece in enumerate(cut):
            yield [*cut[:index], [items[0], *piece], *cut[index + 1 :]]


def prompt(length: int, longest: int = 10) -> Box:
    return Box(0, length, longest)


def test_rectangles_by_hand() -> None:
    # a prompt padded on its left from column 2 to 9, and one on its right from 0 to 4: together columns 0 to 9
    both = Box(2, 9, 3).around(Box(0, 4, 5))
    assert both == Box(0, 9, 5)
    assert both.tokens(2, 3) == 2 * (9 + 3 * 5)
    assert Box(8, 0, 0).tokens(1, 2) == 1 + 2  # nothing real: one column each


@pytest.mark.parametrize(
    ("boxes", "budget", "expected"),
    [
        # 500 + 30, 20 + 30: a piece for each length, though two would be 2 x 530
        ([prompt(500), prompt(20), prompt(500), prompt(20), prompt(20)], 1100, [(0, 2), (1, 3, 4)]),
        # two pieces either way: 3 x (30 + 30) + 1 x (10 + 30), or 2 x 60 + 2 x 40 = 200, which is less
        ([prompt(30), prompt(30), prompt(10), prompt(10)], 180, [(0, 1), (2, 3)]),
        # by completion: 10 + 3 x 100 beside 10 + 3 x 1
        ([prompt(10, 100), prompt(10, 1), prompt(10, 100), prompt(10, 1)], 620, [(0, 2), (1, 3)]),
        # too large alone: a piece all the same
        ([prompt(9), prompt(999), prompt(9)], 100, [(1,), (0, 2)]),
        ([], 100, []),
    ],
)
def test_cuts_by_hand(boxes: list[Box], budget: int, expected: list[tuple[int, ...]]) -> None:
    assert cheapest_cut(boxes, tokens, budget) == expected


LENGTHS = st.integers(1, 900)
BOXES = st.lists(st.tuples(LENGTHS, LENGTHS), max_size=9).map(lambda sizes: [prompt(*size) for size in sizes])


@given(BOXES, st.integers(1, 9000))
def test_it_never_costs_more_than_the_cut_without_sorting(boxes: list[Box], budget: int) -> None:
    cut = cheapest_cut(boxes, tokens, budget)
    assert sorted(n for piece in cut for n in piece) == list(range(len(boxes)))
    assert cost(boxes, cut) <= cost(boxes, consecutive(boxes, budget))


@given(st.lists(LENGTHS, min_size=1, max_size=6), st.integers(1, 4000), st.booleans())
def test_where_one_length_varies_no_cut_is_cheaper(lengths: list[int], budget: int, of_prompts: bool) -> None:
    boxes = [prompt(length, 7) if of_prompts else prompt(7, length) for length in lengths]
    allowed = [
        cut
        for cut in every_cut(range(len(boxes)))
        if all(len(piece) == 1 or tokens(len(piece), around([boxes[n] for n in piece])) <= budget for piece in cut)
    ]
    assert cost(boxes, cheapest_cut(boxes, tokens, budget)) == min(cost(boxes, cut) for cut in allowed)
