"""Numbers over steps as inline SVG, for the report, the page and the docs. The only module that imports matplotlib.

Pure functions: the same numbers give the same bytes (no date, fixed ids), no pyplot state is touched. Text and axes take the
page's own colour (currentColor), so a chart reads on light and on dark; lines use Okabe and Ito's colours, which colour-blind
readers can part (jfly.uni-koeln.de/color). A page may set --chart-1 to --chart-4 to brighten them on dark.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gemma_grpo.escapes import visible

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # blue, orange, green, purple
_INK = "#010203"
"""Placeholder that becomes currentColor."""
_MAX_POINTS = 400
_LONGEST_NAME = 28
"""Characters of a line's name in a drawing."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line: y over x, and where given the band y - spread to y + spread. None and what is not finite leave a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    spread: Sequence[float | None] | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing of this module, which escapes all text in it, with its caption."""

    title: str
    caption: str
    svg: Markup


def curve(
    series: Sequence[Series],
    title: str,
    unit: str,
    *,
    x_label: str = "step",
    reference: float | None = None,
    marks: Sequence[float] = (),
    width: float = 3.4,
    hover: bool = False,
) -> str:
    """Lines over steps. Long, noisy series get a faint raw line under a bold running mean. `reference` is a dashed level, `marks` are
    places on the x axis that get a dotted upright line. With `hover` the drawing says in data- attributes where its numbers lie.

    `width` is in inches of the drawing's own scale; the page may show it at any size.
    """
    with _style(title):
        figure, axes = _figure(width, 2.1)
        for index, one in enumerate(series):
            _draw(axes, one, _COLOURS[index % len(_COLOURS)])
        if reference is not None:
            axes.axhline(reference, color=_INK, alpha=0.55, linewidth=1, linestyle=(0, (4, 3)))
        for place in marks:
            axes.axvline(place, color=_COLOURS[1], alpha=0.9, linewidth=1, linestyle=(0, (1, 2)))
        _widen_flat(axes)
        if len(series) > 1:
            _label_ends(axes, series)
        axes.set_ylabel(_plain(unit), parse_math=False)
        axes.set_xlabel(_plain(x_label), parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        svg = _svg(figure, title)
        return svg.replace("<svg ", f"<svg {_hover(figure, axes, series)} ", 1) if hover else svg


def calibration_curve(points: Sequence[tuple[float, float, float]], title: str) -> str:
    """Predicted against observed probability, points (predicted, observed, n): on the diagonal a prediction means what it says."""
    kept = sorted(point for point in points if all(math.isfinite(value) for value in point))
    lowest = min((math.floor(10 * min(p, o)) / 10 for p, o, _ in kept), default=0.0)  # a judge's own side starts at 0.5
    most = max((n for _, _, n in kept), default=1) or 1
    with _style(title):
        figure, axes = _figure(3.4, 3.0)
        axes.plot([lowest, 1], [lowest, 1], color=_INK, alpha=0.55, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot([p for p, _, _ in kept], [o for _, o, _ in kept], color=_COLOURS[0], linewidth=1.5)
        axes.scatter(
            [p for p, _, _ in kept], [o for _, o, _ in kept], s=[12 + 60 * n / most for _, _, n in kept], color=_COLOURS[0], linewidths=0
        )
        axes.set(xlim=(lowest - 0.03, 1.03), ylim=(lowest - 0.03, 1.03), aspect="equal", xlabel="predicted", ylabel="observed")
        return _svg(figure, title)


def scatter(points: Sequence[Series], title: str, x_label: str, y_label: str, *, lines: Sequence[Series] = (), width: float = 3.4) -> str:
    """Points of several kinds, and lines fitted to them, each kind's in its colour."""
    with _style(title):
        figure, axes = _figure(width, 2.4)
        for index, one in enumerate(points):
            axes.plot(list(one.x), [_number(value) for value in one.y], "o", color=_COLOURS[index % len(_COLOURS)], markersize=4)
        for index, one in enumerate(lines):
            axes.plot(list(one.x), [_number(value) for value in one.y], color=_COLOURS[index % len(_COLOURS)], alpha=0.7, linewidth=1.2)
        _label_ends(axes, points)
        axes.set_ylabel(_plain(y_label), parse_math=False)
        axes.set_xlabel(_plain(x_label), parse_math=False)
        return _svg(figure, title)


def _style(title: str) -> AbstractContextManager[None]:
    """matplotlib's defaults, whatever the user's own style, and text left as text; the title salts the ids, so charts never share one."""
    changes: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": _plain(title), "font.size": 9, "axes.unicode_minus": False}
    return style.context(changes, after_reset=True)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(colors=_INK, labelcolor=_INK, width=0.6, length=3)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set(color=_INK, alpha=0.5, linewidth=0.6)
    axes.grid(axis="y", color=_INK, alpha=0.15, linewidth=0.6)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    return figure, axes


def _draw(axes: Axes, series: Series, colour: str) -> None:
    x, y = _thin([float(value) for value in series.x]), _thin([_number(value) for value in series.y])
    if series.spread is not None:
        half = _thin([_number(value) for value in series.spread])
        low, high = [a - b for a, b in zip(y, half, strict=True)], [a + b for a, b in zip(y, half, strict=True)]
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    noisy = _is_noisy(y)
    marker = "o" if len(y) == 1 else None
    axes.plot(x, y, color=colour, linewidth=0.8 if noisy else 1.6, alpha=0.35 if noisy else 1, marker=marker, markersize=4)
    if noisy:
        axes.plot(x, _running_mean(y, len(y) // 15), color=colour, linewidth=1.8)


def _widen_flat(axes: Axes) -> None:
    """A constant gets a scale around it, rather than one that magnifies rounding."""
    low, high = axes.dataLim.y0, axes.dataLim.y1
    if math.isfinite(low) and high - low <= 1e-6 * max(abs(low), abs(high)):
        half = abs(low) / 2 or 1.0
        axes.set_ylim(low - half, high + half)


def _label_ends(axes: Axes, series: Sequence[Series]) -> None:
    """Names at the lines' ends, pushed apart: no legend to look up, and no colour needed to tell which is which."""
    ends = []
    for index, one in enumerate(series):
        last = next((value for value in reversed([_number(value) for value in one.y]) if math.isfinite(value)), None)
        if last is not None:
            ends.append((last, one, _COLOURS[index % len(_COLOURS)]))
    low, high = axes.get_ylim()
    gap, floor = (high - low) * 0.11, -math.inf
    for value, one, colour in sorted(ends, key=lambda end: end[0]):
        height = max(value, floor)
        floor = height + gap
        right = max(one.x, default=0)
        place: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axes.annotate(_short(_plain(one.label)), (right, height), color=colour, parse_math=False, **place)


def _hover(figure: Figure, axes: Axes, series: Sequence[Series]) -> str:
    """Where the axes lie in the drawing's units, what they reach, and the numbers drawn: for a script that reads them out."""
    place, width, height = axes.get_position(), *(72 * side for side in figure.get_size_inches())
    box = (place.x0 * width, (1 - place.y1) * height, place.x1 * width, (1 - place.y0) * height)
    lines = [
        {"label": _plain(one.label), "x": _thin(list(map(float, one.x))), "y": list(map(_whole, _thin(list(map(_number, one.y)))))}
        for one in series
    ]
    told = {"box": [round(side, 2) for side in box], "limits": [*axes.get_xlim(), *axes.get_ylim()], "lines": lines}
    return f'data-hover="{escape(json.dumps(told))}"'


def _whole(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_figure(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue(), title)


def _inline(document: str, title: str) -> str:
    """The drawing without what only a file needs: XML header, metadata, page-wide style, repeated ids, fixed size."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;]*;", "font-family: inherit;", svg)
    svg = re.sub(r' style="([^"]*)"', _as_attributes, svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]).replace(" \n", " "), svg)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    name = escape(_plain(title))
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg {spaces} {view_box[0] if view_box else ""} role="img" aria-label="{name}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
    for index, colour in enumerate(_COLOURS, start=1):
        svg = svg.replace(colour, f"var(--chart-{index}, {colour})")
    return svg.replace(_INK, "currentColor").strip()


def _as_attributes(style: re.Match[str]) -> str:
    """A style as attributes of its own: a page whose security policy takes no style in its text shows those."""
    parts = (part.split(":", 1) for part in style[1].split(";") if ":" in part)
    return "".join(f' {name.strip()}="{value.strip()}"' for name, value in parts)


def _short(name: str) -> str:
    """A name that leaves room for the line it stands beside; runs' names differ most at their ends."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME // 3]}…{name[-2 * _LONGEST_NAME // 3 :]}"


def _plain(text: str) -> str:
    return visible(text).replace("\n", " ")


def _number(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan


def _is_noisy(values: Sequence[float]) -> bool:
    """Whether the line's ups and downs add up to several times its range, so that a running mean helps."""
    kept = [value for value in values if math.isfinite(value)]
    if len(kept) < 25:
        return False
    return sum(abs(b - a) for a, b in pairwise(kept)) > 3 * (max(kept) - min(kept))


def _running_mean(values: Sequence[float], half: int) -> list[float]:
    means = []
    for index in range(len(values)):
        window = [value for value in values[max(0, index - half) : index + half + 1] if math.isfinite(value)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def _thin(values: Sequence[float]) -> list[float]:
    """At most _MAX_POINTS values, each the mean of its neighbours: a long run must not make a heavy page."""
    if len(values) <= _MAX_POINTS:
        return list(values)
    edges = [index * len(values) // _MAX_POINTS for index in range(_MAX_POINTS + 1)]
    cells = [[value for value in values[low:high] if math.isfinite(value)] for low, high in pairwise(edges)]
    return [sum(cell) / len(cell) if cell else math.nan for cell in cells]
