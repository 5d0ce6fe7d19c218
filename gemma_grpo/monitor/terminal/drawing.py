"""Text that fits: cut, folded and measured by the cells it takes on a screen; sparklines, bars, clocks. No state, no size of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.cells import cell_len, set_cell_size

_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_CHARACTERS_PER_CELL = 4
"""More of a text is not measured: characters that combine take no cell, and a reply can be as long as it likes."""


def cut(text: str, cells: int, ascii_only: bool = False) -> str:
    """The text in at most `cells` cells, an ellipsis where something is left out."""
    if cells <= 0:
        return ""
    mark = "..." if ascii_only else "…"
    if len(text) <= _CHARACTERS_PER_CELL * cells and cell_len(text) <= cells:
        return text
    if cells <= len(mark):
        return mark[:cells]
    return set_cell_size(text[: _CHARACTERS_PER_CELL * cells], cells - len(mark)).rstrip() + mark


def fold(text: str, cells: int, lines: int, ascii_only: bool = False) -> list[str]:
    """The text on at most `lines` lines of `cells` cells, broken between words where there are any; the last one is cut."""
    found: list[str] = []
    while len(found) < lines - 1 and (len(text) > _CHARACTERS_PER_CELL * cells or cell_len(text) > cells):
        fits = _fitting(text, cells)
        space = text.rfind(" ", 0, fits + 1)
        end = space if space > 0 else fits
        found.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return [*found, cut(text, cells, ascii_only)]


def _fitting(text: str, cells: int) -> int:
    """How many of its first characters fit; at least one, so that folding ends."""
    used = 0
    for index, char in enumerate(text[: _CHARACTERS_PER_CELL * cells]):
        used += cell_len(char)
        if used > cells:
            return max(1, index)
    return max(1, min(len(text), _CHARACTERS_PER_CELL * cells))


def sparkline(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """The values as `width` bars at most, each the mean of its share of them, scaled between their extremes."""
    count = min(width, len(values))
    if count <= 0:
        return ""
    edges = [index * len(values) // count for index in range(count + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in pairwise(edges)]
    bars, low, span = _ASCII_BARS if ascii_only else _BARS, min(means), max(means) - min(means)
    return "".join(bars[round((mean - low) / span * (len(bars) - 1))] if span > 0 else bars[0] for mean in means)


def bar(share: float, width: int, ascii_only: bool = False) -> str:
    """A progress bar of fixed width for a share from 0 to 1."""
    full = round(min(1.0, max(0.0, share)) * width)
    return ("#" if ascii_only else "━") * full + ("-" if ascii_only else "╌") * (width - full)


def clock(seconds: float) -> str:
    """Seconds as 0:22, 12:05, 3:04:05 or 2d 3h."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
