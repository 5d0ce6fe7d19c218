"""Reads a run directory for showing it. Never writes, and never fails on one damaged file: what could not be read is told.

The files' schemas are events.py's and evaluation.py's; values are checked where they are shown.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_grpo.run_layout import EVALUATION, EVENTS, LOOKS, METRICS, RECIPE, RUN, SAMPLES, VOTES

Record = Mapping[str, Any]
_KEPT_GROUPS = 64


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What a run directory holds; empty values for what is missing."""

    name: str
    recipe: str
    run: Record
    metrics: list[Record]
    first_groups: list[Record]
    """The first groups of samples.jsonl, all of the first step."""
    last_groups: list[Record]
    """The last groups of samples.jsonl, all of the last step."""
    events: list[Record]
    looks: list[Record]
    """What witnesses.jsonl holds, oldest first."""
    evaluation: Record
    calibration: Record
    profile: Record
    """Of a run with `train --profile` only."""
    votes: list[Record]
    """Of people who compared replies blindly; most runs have none."""
    problems: list[str]
    """One sentence for each file that is missing or damaged."""


def read_run_files(path: str | Path) -> RunFiles:
    """Everything the report shows. Raises ValueError when the path is no run directory at all."""
    path = Path(path)
    if not any((path / name).is_file() for name in (RECIPE, RUN, METRICS, EVALUATION)):
        raise ValueError(f"{path} is not a run directory: it holds no recipe.yaml and no metrics.jsonl. Name one such as runs/miniature-1.")
    problems: list[str] = []
    first, last = _groups(path / SAMPLES, problems)
    return RunFiles(
        name=path.resolve().name,
        recipe=_text(path / RECIPE, problems),
        run=_object(path / RUN, problems),
        metrics=list(_lines(path / METRICS, problems)),
        first_groups=first,
        last_groups=last,
        events=list(_lines(path / EVENTS, problems)),
        looks=list(_lines(path / LOOKS, problems)) if (path / LOOKS).is_file() else [],
        evaluation=_object(path / EVALUATION, problems),
        calibration=_object(path / "reward" / "calibration.json", problems),
        profile=_object(path / "profile.json", problems) if (path / "profile.json").is_file() else {},
        votes=list(_lines(path / VOTES, problems)) if (path / VOTES).is_file() else [],
        problems=problems,
    )


def real(value: Any) -> float | None:
    """The value as a finite number, or None: a file can hold anything."""
    if not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON integers have no limit
        return None
    return number if math.isfinite(number) else None


def parse_object(text: str | bytes) -> Record | None:
    """The JSON object that a text is, or None."""
    try:
        # NaN and Infinity are not JSON; a file that holds them was not written by events.py
        data = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def records(value: Any) -> list[Record]:
    """The objects of a list, or an empty list."""
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _text(path: Path, problems: list[str]) -> str:
    if not path.is_file():
        problems.append(f"{path.name} is missing.")
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _object(path: Path, problems: list[str]) -> Record:
    text = _text(path, problems)
    if not text:
        return {}
    data = parse_object(text)
    if data is None:
        problems.append(f"{path.name} is damaged: it is not a JSON object.")
        return {}
    return data


def _lines(path: Path, problems: list[str]) -> Iterator[Record]:
    """The objects of a log, line by line; a line that is none is counted, a torn last one (a run still writing) is passed over."""
    if not path.is_file():
        problems.append(f"{path.name} is missing.")
        return
    damaged = 0
    with path.open(encoding="utf-8", errors="replace", newline="\n") as log:
        for line in log:
            data = parse_object(line)
            if data is not None:
                yield data
            else:
                damaged += line.endswith("\n")
    if damaged:
        problems.append(f"{path.name}: {damaged} damaged lines left out.")


def _groups(path: Path, problems: list[str]) -> tuple[list[Record], list[Record]]:
    """Groups of the first and of the last step, without holding a long log in memory."""
    first: list[Record] = []
    last: deque[Record] = deque(maxlen=_KEPT_GROUPS)
    for line in _lines(path, problems):
        if len(first) < _KEPT_GROUPS and (not first or line.get("step") == first[0].get("step")):
            first.append(line)
        last.append(line)
    return first, [line for line in last if line.get("step") == last[-1].get("step")]
