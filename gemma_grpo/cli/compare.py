"""`gemma-grpo compare RUN RUN ...`: what several runs came to, side by side, and in which settings they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from gemma_grpo.cli.printing import say
from gemma_grpo.escapes import printable
from gemma_grpo.monitor.differences import differences

Runs = Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Two or more run directories, such as runs/miniature-1.")]


def compare(runs: Runs) -> None:
    """Put the evaluations of several runs side by side, with the settings in which they differ."""
    if len(runs) < 2:
        raise ValueError(f"compare needs two runs or more, and {len(runs)} is given. Name another run directory.")
    from gemma_grpo.monitor.run_files import read_run_files

    files = [read_run_files(run) for run in runs]
    evaluations, differing = [one.evaluation for one in files], differences(runs)
    say(*table([one.name for one in files], evaluations), "")
    if list(differing) == ["seed"]:
        say(*seed_lines(evaluations), "")
    say(*settings_lines(differing))


def table(names: Sequence[str], evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each metric that any of them has: after training, and the gain with its interval."""
    from gemma_grpo.monitor.findings import compared

    rows = [[row.title, *(" ".join(filter(None, cell)) if cell else "-" for cell in row.cells)] for row in compared(evaluations)]
    return _aligned([["", *(printable(name) for name in names)], *rows])


def baseline_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """The run beside the plain ways that it was measured against; none where there are none."""
    baselines = evaluation.get("baselines") or {}
    return ["", *table(["this run", *baselines], [evaluation, *baselines.values()])] if baselines else []


def seed_lines(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The gain of each metric over runs that differ by their seed alone: mean, lowest and highest."""
    from gemma_grpo.monitor.findings import STYLES, measure, show

    rows = [[f"gain over {len(evaluations)} seeds", "mean", "lowest", "highest"]]
    for name, style in STYLES.items():
        gains = [one.gain for evaluation in evaluations if (one := measure(evaluation.get(name)))]
        if len(gains) == len(evaluations):
            rows.append([style.title, *(show(value, style, signed=True) for value in (fmean(gains), min(gains), max(gains)))])
    return _aligned(rows)


def settings_lines(differing: Mapping[str, Sequence[Any]]) -> list[str]:
    """The settings that differ, as lines."""
    if not differing:
        return ["the settings are the same"]
    return _aligned([[name, *(printable(str(value)) for value in values)] for name, values in differing.items()])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
