"""Which runs there are to show, and what is known of each without reading a whole log.

Owns the way from a run's name in a request to its folder: a name is looked up among the folders that are there, never made into a path.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from gemma_grpo.containment import link_out
from gemma_grpo.monitor import findings, watched
from gemma_grpo.monitor.run_files import Record, parse_object, real, records
from gemma_grpo.monitor.web.logs import last_line, lines_before, size, spread_lines
from gemma_grpo.monitor.writer import told_writer
from gemma_grpo.run_layout import EVALUATION, EVENTS, LOOKS, METRICS, RECIPE, RUN, SAMPLES

SPARK_POINTS = 60
MOST_RUNS = 500
LARGEST_FILE = 16 * 2**20
"""Bytes, of run.json, evaluation.json and the like; a larger one was not written by a run."""
SILENT = 120.0
"""Seconds without a line after which a run that should be training is told to be silent."""


class NoSuchRunError(LookupError):
    """No run of that name is here."""


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs in a folder, or one run alone."""

    root: Path
    only: str | None = None

    @classmethod
    def at(cls, path: Path) -> Runs:
        """A run directory, or a folder of them. Raises ValueError where there is no such folder."""
        path = path.resolve()
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder. Name a run directory such as runs/miniature-1, or the folder that holds runs.")
        return cls(path.parent, path.name) if _is_run(path) else cls(path)

    def listed(self) -> list[Path]:
        """The runs' folders, the one that was written last first; MOST_RUNS at most. One with a link that leads out of it is none."""
        newest = sorted(((_written(path), path) for path in self._folders()), reverse=True)[:MOST_RUNS]
        return [path for _, path in newest if link_out(path) is None]

    def path_of(self, name: str) -> Path:
        """The folder of a run of that name. Raises NoSuchRunError."""
        path = next((path for path in self._folders() if path.name == name), None)
        if path is None or link_out(path) is not None:
            raise NoSuchRunError(name)
        return path

    def _folders(self) -> list[Path]:
        if self.only is not None:
            path = self.root / self.only
            return [path] if _is_run(path) else []
        try:
            with os.scandir(self.root) as entries:
                folders = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            return []
        return [path for path in folders if _is_run(path)]


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (RECIPE, RUN, METRICS))


def _written(path: Path) -> float:
    """When any of the run's logs was written last, in seconds since 1970."""
    times = []
    for name in (METRICS, EVENTS, RUN, RECIPE):
        try:
            times.append((path / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)


def read_object(path: Path) -> Record:
    """A JSON file's object; empty where it is missing, damaged or too large."""
    if size(path) > LARGEST_FILE:
        return {}
    try:
        return parse_object(path.read_bytes()) or {}
    except OSError:
        return {}


def read_text(path: Path) -> str:
    """A text file, empty where it is missing or too large."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") if size(path) <= LARGEST_FILE else ""
    except OSError:
        return ""


def status(path: Path, run: Record) -> tuple[str, str]:
    """What a run is doing, in a word, and a sentence where that needs one."""
    said = str(run.get("status") or "unknown")
    if said != "running":
        return said, str(run.get("error") or "")
    quiet = time.time() - _written(path)
    writer = told_writer(path)
    if writer == "gone":
        return "interrupted", "Its process is gone without having said so. `gemma-grpo train ... --resume` goes on with it."
    if writer == "elsewhere":
        return "elsewhere", f"It was written on another machine; its newest file here is {quiet / 60:.0f} min old."
    if quiet > SILENT:
        return "silent", f"It has written nothing for {quiet / 60:.0f} min. A long step, or it hangs."
    return "running", ""


def overview(path: Path) -> dict[str, Any]:
    """A run's line in the list of runs."""
    run, last = read_object(path / RUN), last_line(path / METRICS)
    word, sentence = status(path, run)
    said = findings.verdict(read_object(path / EVALUATION))
    return {
        "name": path.name,
        "status": word,
        "status_text": sentence,
        "model": run.get("model"),
        "dataset": run.get("dataset"),
        "started": real(run.get("started")),
        "written": _written(path),
        "step": real(last.get("step")) or 0,
        "total_steps": real(run.get("total_steps")),
        "reward": real(last.get("reward")),
        "rewards": list(_course(path / METRICS, size(path / METRICS))),
        "verdict": None if said is None else {"tone": said.tone, "headline": said.headline, "sentence": said.sentence},
        "sizes": {name: size(path / name) for name in (METRICS, SAMPLES, LOOKS, EVENTS)},
    }


@lru_cache(maxsize=MOST_RUNS)
def _course(metrics: Path, bytes_: int) -> tuple[float, ...]:
    """The reward over the steps, in few points; read anew when the log has another size."""
    points = spread_lines(metrics, 4 * SPARK_POINTS, whole=SHORT)  # a mean of four or more for each point
    return tuple(_thinned([value for line in points if (value := real(line.get("reward"))) is not None]))


SHORT = 2**18
"""Bytes of a log whose lines are all read for the list's small curve."""


def _thinned(values: Sequence[float]) -> list[float]:
    count = min(SPARK_POINTS, len(values))
    edges = [index * len(values) // count for index in range(count + 1)] if count else []
    return [sum(values[low:high]) / (high - low) for low, high in pairwise(edges)]


def summary(path: Path, looks: Sequence[Record]) -> dict[str, Any]:
    """What stands on a run's own page besides curves and replies. `looks` need no replies."""
    run, events = read_object(path / RUN), _events(path)
    evaluation = read_object(path / EVALUATION)
    said = findings.verdict(evaluation)
    return {
        **overview(path),
        "verdict": None if said is None else asdict(said),
        "versions": run.get("versions"),
        "precision": run.get("precision"),
        "data": run.get("data"),
        "recipe": read_text(path / RECIPE),
        "alarms": [alarm for look in looks for alarm in records(look.get("alarms"))],
        "parting": watched.parting_lines(watched.parting(looks)),
        "told": [event for event in events if event.get("kind") in ("warn", "note", "rollback", "error", "alarm")][-40:],
        "pace": _pace(events),
        "evaluation": [{"title": row.title, "cell": row.cells[0]} for row in findings.compared([evaluation]) if row.cells[0] is not None],
    }


def _events(path: Path) -> list[Record]:
    """The newest events: what a page has room for."""
    return lines_before(path / EVENTS, size(path / EVENTS), 2**20).lines


def _pace(events: Sequence[Record]) -> dict[str, float]:
    """Mean seconds of each phase of the newest steps."""
    steps = [event["seconds"] for event in events if event.get("kind") == "step_time" and isinstance(event.get("seconds"), dict)][-20:]
    names = list(dict.fromkeys(name for seconds in steps for name in seconds))
    return {name: sum(real(seconds.get(name)) or 0.0 for seconds in steps) / len(steps) for name in names}
