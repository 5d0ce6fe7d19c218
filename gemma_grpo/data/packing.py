"""Which sequences share a piece: similar lengths together, so that little of its rectangles is padding. Plain numbers, no tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

PIECE_TOKENS = 512
"""What one more piece counts as, in padded tokens: it starts every kernel and reads every weight anew, and padding costs attention alone.
Less on a CPU, more on a large GPU; one number, so that no cut depends on the device."""


class Box(NamedTuple):
    """The rectangles around some sequences: prompts from their first to their last real column, and the longest completion."""

    first: int
    stop: int
    longest: int

    def around(self, other: Box) -> Box:
        """The rectangles around both."""
        return Box(min(self.first, other.first), max(self.stop, other.stop), max(self.longest, other.longest))

    def tokens(self, prompts: int, completions: int) -> int:
        """Padded tokens of so many prompts with so many completions each; an empty sequence keeps one column."""
        return prompts * (max(1, self.stop - self.first) + completions * max(1, self.longest))


Tokens = Callable[[int, Box], int]
"""Padded tokens of so many of the boxes that are cut, with the box around them."""


def cheapest_cut(boxes: Sequence[Box], tokens: Tokens, budget: int) -> list[tuple[int, ...]]:
    """Indices of the boxes in pieces of at most `budget` padded tokens, ascending in each; a box alone may have more.

    The cost is that of padding and pieces together: padded tokens, and PIECE_TOKENS for each piece. Pieces are consecutive in one
    of four orders, the one whose best cut is cheapest: as they are, by prompt, by completion, by both. Where only one of the two
    lengths varies no cut of any kind is cheaper, as pieces of the same sizes filled in that order are no wider. Where both do it is
    at most what the best cut without sorting costs.
    """
    as_they_are = list(range(len(boxes)))
    keys: list[Callable[[int], tuple[int, int]]] = [
        lambda n: (boxes[n].stop - boxes[n].first, boxes[n].longest),
        lambda n: (boxes[n].longest, boxes[n].stop - boxes[n].first),
        lambda n: (tokens(1, boxes[n]), boxes[n].longest),
    ]
    orders = [as_they_are, *(sorted(as_they_are, key=key, reverse=True) for key in keys)]
    cuts = [_cut_in_order([boxes[n] for n in order], tokens, budget) for order in orders]
    cheapest = min(range(len(orders)), key=lambda index: cuts[index][0])
    return [tuple(sorted(orders[cheapest][run])) for run in cuts[cheapest][1]]


def _cut_in_order(boxes: Sequence[Box], tokens: Tokens, budget: int) -> tuple[int, list[slice]]:
    """The cost of the cheapest cut into consecutive runs that fit, and the runs."""
    best = [(0, 0)]  # of the first so many boxes: the cost, and where their last run starts
    for end in range(1, len(boxes) + 1):
        box = boxes[end - 1]
        found: list[tuple[int, int]] = []
        for start in reversed(range(end)):
            box = box.around(boxes[start])
            size = tokens(end - start, box)
            if found and size > budget:
                break  # more boxes need no less; one alone is a run however large it is
            found.append((best[start][0] + size + PIECE_TOKENS, start))
        best.append(min(found, key=lambda choice: choice[0]))  # of equals the first: what is left over makes the last run
    runs, end = [], len(boxes)
    while end:
        runs.append(slice(best[end][1], end))
        end = best[end][1]
    return best[-1][0], runs[::-1]
