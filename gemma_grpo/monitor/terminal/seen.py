"""What a run has told its view so far. Holds it, and says nothing: how it looks is picture.py's and lines.py's."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gemma_grpo.monitor.run_files import Record, real, records
from gemma_grpo.monitor.terminal.pace import Pace
from gemma_grpo.types import ScoredGroup, StepRecord

_CURVES = ("reward", "kl", "entropy", "completions/mean_length")
_WARNINGS = 5


@dataclass(frozen=True, slots=True)
class JudgeTraining:
    """How far the training of a judge has come."""

    adapter: str
    update: int
    total: int
    loss: float
    accuracy: float
    """Share of the update's pairs that it orders as people did."""
    left: float | None
    """Seconds, at the pace so far; None after the first update."""


@dataclass
class Seen:
    """What is known of a run; every field is replaced and never changed in place, as a screen is redrawn from another thread."""

    phase: str = ""
    phase_started: float = field(default_factory=time.monotonic)
    expected: float | None = None
    """Seconds that this phase may take, where that can be reckoned."""
    over: bool = False
    """Nothing more will come: no time is left, and nothing is under way."""
    training: JudgeTraining | None = None
    record: StepRecord | None = None
    total_steps: int = 0
    group: ScoredGroup | None = None
    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    first_look: Record | None = None
    last_look: Record | None = None
    alarms: tuple[Record, ...] = ()
    """Of all looks, oldest first."""
    warnings: int = 0
    last_warnings: tuple[str, ...] = ()
    pace: Pace = field(default_factory=Pace)

    def begin(self, phase: str, expected: float | None = None) -> None:
        """A new stage of the run."""
        self.phase, self.phase_started, self.expected, self.over = phase, time.monotonic(), expected, False

    def step(self, record: StepRecord, total_steps: int, group: ScoredGroup | None) -> None:
        """A step is done."""
        self.training, self.record, self.total_steps, self.group = None, record, total_steps, group
        self._draw(record.metrics)
        self.pace.step(record.seconds)

    def earlier(self, metrics: Sequence[Mapping[str, object]], looks: Sequence[Record]) -> None:
        """What the run did before this session, from its logs."""
        self.curves = {}
        self._draw(*metrics)
        self.look(looks)

    def look(self, looks: Sequence[Record]) -> None:
        """All looks so far."""
        if looks:
            self.first_look, self.last_look = looks[0], looks[-1]
            self.alarms = tuple(alarm for look in looks for alarm in records(look.get("alarms")))

    def warn(self, text: str) -> None:
        """Something that may need the user."""
        self.warnings, self.last_warnings = self.warnings + 1, (*self.last_warnings, text)[-_WARNINGS:]

    def _draw(self, *steps: Mapping[str, object]) -> None:
        # a step whose replies no reward could score has none
        new = {name: [value for step in steps if (value := real(step.get(name))) is not None] for name in _CURVES}
        self.curves = {name: (*self.curves.get(name, ()), *values) for name, values in new.items()}
