"""ProgressView: what a trainer tells while it goes. Takes it in and hands it to the screen; reads types.py's nouns and never a trainer."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO, cast

from rich.console import Console

from gemma_grpo.escapes import visible
from gemma_grpo.monitor.profile_table import TITLE, profile_notes, profile_rows
from gemma_grpo.monitor.run_files import Record, records
from gemma_grpo.monitor.terminal.notebook import Notebook, publisher
from gemma_grpo.monitor.terminal.pace import EVALUATION, Schedule
from gemma_grpo.monitor.terminal.screens import Log, Output, Screen, Terminal
from gemma_grpo.monitor.terminal.seen import JudgeTraining, Seen
from gemma_grpo.redact import redact
from gemma_grpo.types import ScoredGroup, StepRecord

_SAID = {"alert": "bold red", "warn": "yellow", "note": "cyan"}


class ProgressView:
    """Shows a run while it goes; a context manager. Without a terminal it prints lines, so nothing scrolls an error away."""

    def __init__(self, console: Console | None = None) -> None:
        self._seen = Seen()
        self._screen = _screen(console, self._seen)
        self._training_began: tuple[str, int, float] | None = None

    @classmethod
    def silent(cls) -> ProgressView:
        """One that shows nothing: of several ranks only the first speaks."""
        return cls(Console(file=Path(os.devnull).open("w", encoding="utf-8")))

    def __enter__(self) -> ProgressView:
        self._seen.over = False
        self._screen.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop redrawing; the last picture stays above whatever is printed next."""
        self._seen.over = True
        self._screen.stop()

    def phase(self, name: str, detail: str = "") -> None:
        """A new stage of the run begins."""
        expected = self._seen.pace.mean(EVALUATION) if name == EVALUATION else None
        self._seen.begin(redact(f"{name}: {detail}" if detail else name), expected)
        self._screen.phase()

    def note(self, text: str) -> None:
        """Something worth knowing, kept above the picture."""
        self._screen.say("note: ", redact(text), "cyan")

    def warn(self, text: str) -> None:
        """Something that may need the user, kept above the picture; the last one and their number stay in it too."""
        self._seen.warn(redact(text))
        self._screen.say("warning: ", redact(text), "yellow")

    def schedule(self, schedule: Schedule) -> None:
        """What is to come beside the steps: the ETA has it in it from its first measurement on."""
        self._seen.pace.schedule = schedule

    def earlier(self, metrics: Sequence[Mapping[str, object]], looks: Sequence[Record]) -> None:
        """What the run's logs hold of the sessions before this one."""
        self._seen.earlier(metrics, looks)

    def took(self, what: str, seconds: float, step: int) -> None:
        """A "look", a "checkpoint" or the "evaluation" after `step` finished steps is done."""
        self._seen.pace.took(what, seconds, step)

    def reward_training(self, update: int, total: int, loss: float, accuracy: float, adapter: str = "reward") -> None:
        """Progress of a judge's adapter: `accuracy` is the share of pairs it orders as people did. About 20 lines without a terminal."""
        now = time.monotonic()
        if self._training_began is None or update <= 1 or self._training_began[0] != adapter:
            self._training_began = adapter, update, now
        _, first, began = self._training_began
        left = (now - began) / (update - first) * (total - update) if update > first else None
        self._seen.training = JudgeTraining(adapter, update, total, loss, accuracy, left)
        self._screen.training()

    def step(self, record: StepRecord, total_steps: int, group: ScoredGroup | None = None) -> None:
        """One training step is done. `group` is one of its groups, shown with its best and its worst completion."""
        self._seen.step(record, total_steps, group)
        self._screen.step()

    def look(self, looks: Sequence[Record]) -> None:
        """A look was taken: all of the run's, oldest first. The last one's numbers stay in the picture, and so do all alarms."""
        self._seen.look(looks)
        self._screen.look()
        for alarm in records(looks[-1].get("alarms")):
            level = str(alarm.get("level"))
            self._screen.say(f"{visible(level)} at step {alarm.get('step')}: ", str(alarm.get("text")), _SAID.get(level, "yellow"))

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """A titled table, kept; the first row is the header. Without a terminal its columns are aligned by spaces."""
        self._screen.table(redact(title), [[redact(str(cell)) for cell in row] for row in rows])

    def profile(self, profile: Record) -> None:
        """The run is over, and this is where its time went: profile.json, below the last picture."""
        self.close()
        if rows := profile_rows(profile):
            self.table(TITLE, rows)
        for text in profile_notes(profile):
            self.note(text)


def _screen(console: Console | None, seen: Seen) -> Screen:
    """A terminal that can be redrawn, a notebook's output, or lines: pipes, files, TERM=dumb, and whatever CI calls its output."""
    if console is None:
        publish, output = publisher(), Output()
        if publish is not None:
            return Notebook(publish, seen)
        # asked of the stream itself: FORCE_COLOR and its like, which CI sets, make rich redraw into a file; and what a notebook runs
        # by "!" is told that it has a terminal, which then moves no cursor
        terminal = bool(output.isatty()) and "JPY_PARENT_PID" not in os.environ
        console = Console(file=cast(TextIO, output), force_terminal=terminal, highlight=False, markup=False, emoji=False)
    return Terminal(console, seen) if console.is_terminal and not console.is_dumb_terminal else Log(console, seen)
