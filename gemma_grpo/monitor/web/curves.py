"""The charts of runs, drawn when they are asked for and kept until a log has grown.

A chart costs a tenth of a second of a core, which the training beside it may need: drawing charts anew takes SHARE of this machine's
cores at most, so that a page with many of them brings them up to date one after the other.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_grpo.monitor.run_charts import Lines, Panel, draw, training_panels, watched_panels
from gemma_grpo.monitor.run_files import Record
from gemma_grpo.monitor.web.logs import lines_after, size, spread_lines
from gemma_grpo.run_layout import LOOKS, METRICS

POINTS = 400
"""Lines that stand for a long log: as many as a chart has points."""
SHARE = 0.04
KEPT_RUNS, KEPT_CHARTS = 16, 256
_BITE = 2**22


@dataclass(slots=True)
class _Looks:
    """The looks of one run without their replies, read on from where the last reading ended."""

    read: int = 0
    found: list[Record] = field(default_factory=list)

    def up_to_date(self, path: Path) -> list[Record]:
        total = size(path)
        if total < self.read:  # cut back by a resume
            self.read, self.found = 0, []
        while self.read < total:
            bite = lines_after(path, self.read, _BITE)
            if bite.end == self.read:
                break
            self.read = bite.end
            self.found += [{name: line.get(name) for name in ("step", "metrics", "alarms")} for line in bite.lines]
        return list(self.found)


@dataclass(slots=True)
class _Drawn:
    version: tuple[tuple[int, int], ...]
    svg: str


class Curves:
    """Keeps what was read and drawn; may be asked from several threads."""

    def __init__(self) -> None:
        self._looks: OrderedDict[Path, _Looks] = OrderedDict()
        self._lines: OrderedDict[Path, tuple[tuple[int, ...], Lines]] = OrderedDict()
        self._charts: OrderedDict[tuple[Any, ...], _Drawn] = OrderedDict()
        self._reading, self._drawing = threading.Lock(), threading.Lock()
        self._free_at = 0.0

    def lines(self, path: Path) -> Lines:
        """What a run's curves are drawn from, as of now."""
        with self._reading:
            version = _version(path)
            kept = self._lines.get(path)
            if kept is None or kept[0] != version:
                looks = self._looks.setdefault(path, _Looks()).up_to_date(path / LOOKS)
                kept = version, Lines(path.name, spread_lines(path / METRICS, POINTS), looks)
                self._lines[path] = kept
            _keep_newest(self._lines, path, KEPT_RUNS)
            _keep_newest(self._looks, path, KEPT_RUNS)
            return kept[1]

    def panels(self, path: Path) -> list[Panel]:
        """What a run has curves of."""
        lines = self.lines(path)
        training = training_panels(lines.metrics)
        return [*training[:1], *watched_panels(lines.looks), *training[1:]]

    def chart(self, paths: Sequence[Path], key: str) -> tuple[str, str] | None:
        """The drawing of one number, a line for each run, and what it is a drawing of; None where no run has that number.

        It may be older than the logs: whoever wants the newest asks again.
        """
        with self._drawing:
            name, now = (*paths, key), time.monotonic()
            version = tuple(map(_version, paths))
            kept = self._charts.get(name)
            if kept is None or (kept.version != version and now >= self._free_at):
                panel = next((panel for path in paths for panel in self.panels(path) if panel.key == key), None)
                if panel is None:
                    return None
                svg = draw(panel, [self.lines(path) for path in paths], hover=True).svg
                if kept is not None:  # what was never drawn is owed at once
                    self._free_at = now + (time.monotonic() - now) / (SHARE * (os.cpu_count() or 1))
                kept = self._charts[name] = _Drawn(version, str(svg))
            _keep_newest(self._charts, name, KEPT_CHARTS)
            return kept.svg, version_text(kept.version)


def version_text(version: Sequence[tuple[int, int]]) -> str:
    """Sizes of the logs as a short text."""
    return "-".join(f"{metrics}.{looks}" for metrics, looks in version)


def _version(path: Path) -> tuple[int, int]:
    return size(path / METRICS), size(path / LOOKS)


def _keep_newest(kept: OrderedDict[Any, Any], name: Any, most: int) -> None:
    kept.move_to_end(name)
    while len(kept) > most:
        kept.popitem(last=False)
