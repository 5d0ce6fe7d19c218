"""The charts of runs, drawn when they are asked for and kept until a log has grown.

A chart costs a tenth of a second of a core, which the training beside it may need: drawing charts anew takes SHARE of this machine's
cores at most, so that a page with many of them brings them up to date one after the other.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_grpo.monitor.run_charts import Lines, Panel, charted, draw, training_panels, watched_panels
from gemma_grpo.monitor.run_files import Record
from gemma_grpo.monitor.web.logs import WHOLE, lines_after, size, spread_lines
from gemma_grpo.run_layout import LOOKS, METRICS

POINTS = 400
"""Lines that stand for a long log: as many as a chart has points."""
SHARE = 0.04
KEPT_RUNS, KEPT_CHARTS = 16, 256
_BITE = 2**22


@dataclass(slots=True)
class _Grown:
    """The lines of a log, read on from where the last reading ended; of each, what `keep` keeps."""

    keep: Callable[[Record], Record]
    read: int = 0
    found: list[Record] = field(default_factory=list)
    _last: int = 0

    def up_to_date(self, path: Path) -> list[Record]:
        """All that there are now."""
        if not self._goes_on(path):
            self.read, self.found, self._last = 0, [], 0
        while self.read < size(path):
            bite = lines_after(path, self.read, _BITE)
            if bite.end == self.read:
                break
            self.read = bite.end
            self._last = bite.starts[-1] if bite.starts else self._last
            self.found += map(self.keep, bite.lines)
        return list(self.found)

    def _goes_on(self, path: Path) -> bool:
        """Whether the log still holds what was read: a resume cuts it back, and may have written on since."""
        if not self.found:
            return size(path) >= self.read
        return size(path) >= self.read and [self.keep(line) for line in lines_after(path, self._last, 1).lines] == self.found[-1:]


def _without_replies(look: Record) -> Record:
    return {name: look.get(name) for name in ("step", "metrics", "alarms")}


@dataclass(slots=True)
class _Read:
    """What was read of one run."""

    metrics: _Grown = field(default_factory=lambda: _Grown(charted))
    looks: _Grown = field(default_factory=lambda: _Grown(_without_replies))

    def lines(self, path: Path) -> Lines:
        log = path / METRICS
        metrics = list(map(charted, spread_lines(log, POINTS))) if size(log) > WHOLE else self.metrics.up_to_date(log)
        return Lines(path.name, metrics, self.looks.up_to_date(path / LOOKS))


@dataclass(slots=True)
class _Drawn:
    version: tuple[tuple[int, int], ...]
    svg: str


class Curves:
    """Keeps what was read and drawn; may be asked from several threads."""

    def __init__(self) -> None:
        self._read: OrderedDict[Path, _Read] = OrderedDict()
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
                kept = self._lines[path] = version, self._read.setdefault(path, _Read()).lines(path)
            _keep_newest(self._lines, path, KEPT_RUNS)
            _keep_newest(self._read, path, KEPT_RUNS)
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
        name, version = (*paths, key), tuple(map(_version, paths))
        kept = self._charts.get(name)
        if kept is not None and (kept.version == version or time.monotonic() < self._free_at or self._drawing.locked()):
            return kept.svg, version_text(kept.version)
        with self._drawing:
            drawn = self._draw(paths, key, version, owed=kept is None)
        return None if drawn is None else (drawn.svg, version_text(drawn.version))

    def _draw(self, paths: Sequence[Path], key: str, version: tuple[tuple[int, int], ...], *, owed: bool) -> _Drawn | None:
        name, began = (*paths, key), time.monotonic()
        kept = self._charts.get(name)
        if kept is None or not (owed or kept.version == version):  # another request may have drawn it meanwhile
            panel = next((panel for path in paths for panel in self.panels(path) if panel.key == key), None)
            if panel is None:
                return None
            kept = self._charts[name] = _Drawn(version, str(draw(panel, [self.lines(path) for path in paths], hover=True).svg))
            if not owed:  # what was never drawn is owed at once
                self._free_at = time.monotonic() + (time.monotonic() - began) / (SHARE * (os.cpu_count() or 1))
        _keep_newest(self._charts, name, KEPT_CHARTS)
        return kept


def version_text(version: Sequence[tuple[int, int]]) -> str:
    """Sizes of the logs as a short text."""
    return "-".join(f"{metrics}.{looks}" for metrics, looks in version)


def _version(path: Path) -> tuple[int, int]:
    return size(path / METRICS), size(path / LOOKS)


def _keep_newest(kept: OrderedDict[Any, Any], name: Any, most: int) -> None:
    kept.move_to_end(name)
    while len(kept) > most:
        kept.popitem(last=False)
