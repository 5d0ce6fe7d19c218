"""Pictures of the figures, as SVG for the docs: bars for the steps of the two sides, lines for growth."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

COLOURS = {"rollout": "#0072b2", "reward": "#f0e442", "old_logprobs": "#cc79a7", "reference": "#009e73", "update": "#d55e00"}
"""Of Okabe and Ito, which colour-blind readers can part."""
_STYLE: Any = {"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}


def bars(rows: Sequence[tuple[str, Mapping[str, float]]], title: str) -> str:
    """A bar for each row, its phases one after another, as shares of the longest row of its pair: rows come as ours, TRL's, ours, ..."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 0.6 + 0.26 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for index, (_, phases) in enumerate(rows):
            longest = max(sum(rows[k][1].values()) for k in (index - index % 2, index - index % 2 + 1))
            start = 0.0
            for name, colour in COLOURS.items():
                share = phases.get(name, 0.0) / longest
                axes.barh(index + 0.35 * (index // 2), share, left=start, color=colour, label=name if index == 1 else None)
                start += share
            axes.text(start + 0.01, index + 0.35 * (index // 2), f"{sum(phases.values()):.1f} s", va="center")
        axes.set_yticks([index + 0.35 * (index // 2) for index in range(len(rows))], [label for label, _ in rows])
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.12), xticks=[], title=title)
        axes.spines["bottom"].set_visible(False)
        axes.legend(ncols=len(COLOURS), loc="upper center", bbox_to_anchor=(0.5, 0.0), frameon=False)
        return _svg(figure)


def lines(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], unit: str) -> str:
    """A panel for each thing that grows, both axes logarithmic: a straight line of slope 1 is growth in proportion."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 2.3), layout="constrained")
        for index, (label, series) in enumerate(panels.items()):
            axes = figure.add_subplot(1, len(panels), index + 1)
            for name, points in series.items():
                axes.plot(*zip(*points, strict=True), color=COLOURS[name], marker="o", markersize=3, label=name)
            axes.set(xscale="log", yscale="log", xlabel=label)
            axes.set_xticks([x for x, _ in points], [f"{x:g}" for x, _ in points])
            axes.set_xticks([], minor=True)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_yticks([], minor=True)
            if index == 0:
                axes.set_ylabel(unit)
                axes.legend(frameon=False)
        return _svg(figure)


def _svg(figure: Any) -> str:
    """The same numbers give the same bytes: no date, no random ids."""
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})  # type: ignore[no-untyped-call]
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
