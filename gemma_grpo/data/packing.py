"""What shares a pass: as few passes as can be found quickly, each as full as may be. Plain numbers, no tensors."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit_decreasing(sizes: Sequence[int], room: int) -> list[tuple[int, ...]]:
    """Indices of the sizes in bins that hold at most `room`, ascending in each; a size beyond it has a bin to itself.

    Each size, the largest first, goes into the first bin that has room: never more than 11/9 of the fewest bins and 6/9.
    Source: Dosa 2007, doi:10.1007/978-3-540-74450-4_1.
    """
    bins: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: sizes[index], reverse=True):
        place = next((place for place, free in enumerate(left) if sizes[index] <= free), None)
        if place is None:
            bins.append([index])
            left.append(room - sizes[index])
        else:
            bins[place].append(index)
            left[place] -= sizes[index]
    return [tuple(sorted(indices)) for indices in bins]
