"""How long a run still takes, and what its time goes to: from times that were measured in this session, and nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

_PACE_STEPS = 20
"""Steps whose mean time stands for those to come."""
LOOK, CHECKPOINT, EVALUATION = "look", "checkpoint", "evaluation"


@dataclass(frozen=True, slots=True)
class Schedule:
    """What a run does beside its steps."""

    look_every: int = 0
    """Steps between two looks; one comes after the last step too. 0 for none."""
    save_every: int | None = None
    """Steps between two checkpoints; one comes after the last step too, with 0 that one alone. None where nothing is saved."""
    evaluation_looks: float = 0.0
    """How many looks the evaluation at the end is worth, counted in replies; 0 where there is none."""

    def due(self, what: str, step: int, total: int) -> bool:
        """Whether a look or a checkpoint follows this step."""
        every = self.look_every if what == LOOK else self.save_every
        if every is None or (what == LOOK and not every):
            return False
        return step == total or (every > 0 and step % every == 0)


@dataclass(frozen=True, slots=True)
class Remaining:
    """Seconds that are left."""

    parts: Mapping[str, float]
    """By what they go to: steps, and what was measured of the looks, checkpoints and evaluation that are to come."""
    unknown: tuple[str, ...]
    """What is to come and was not measured yet: it is not in the sum."""

    @property
    def seconds(self) -> float:
        """The sum of the parts."""
        return sum(self.parts.values())


@dataclass
class Pace:
    """What took how long."""

    schedule: Schedule = field(default_factory=Schedule)
    _steps: list[Mapping[str, float]] = field(default_factory=list)
    _first: Mapping[str, float] | None = None
    _sums: dict[str, float] = field(default_factory=dict)
    _taken: dict[str, list[float]] = field(default_factory=dict)
    _last: dict[str, int] = field(default_factory=dict)
    """The last step after which there was a look or a checkpoint."""

    def step(self, seconds: Mapping[str, float]) -> None:
        """A step's phases."""
        if self._first is None:
            self._first = seconds
        self._steps = [*self._steps, seconds][-_PACE_STEPS:]
        for name, value in seconds.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def took(self, what: str, seconds: float, step: int) -> None:
        """A look, a checkpoint or an evaluation after this many steps."""
        self._sums[what] = self._sums.get(what, 0.0) + seconds
        self._taken[what] = [*self._taken.get(what, []), seconds][-_PACE_STEPS:]
        self._last[what] = step

    def shares(self) -> dict[str, float]:
        """Of the time measured so far: the phases of the steps first, then what is done beside them."""
        total = sum(self._sums.values()) or 1.0
        order = sorted(self._sums, key=lambda name: name in self._taken)
        return {name: self._sums[name] / total for name in order}

    def mean(self, what: str) -> float | None:
        """Seconds that one takes; None where none was measured, but an evaluation is reckoned from the looks."""
        if what in self._taken:
            return statistics.fmean(self._taken[what])
        look = self._taken.get(LOOK)
        return statistics.fmean(look) * self.schedule.evaluation_looks if look and what == EVALUATION else None

    def left(self, step: int, total: int) -> Remaining:
        """What is left after this step; a look or a checkpoint that follows it is still to come until it was told of."""
        parts = {"steps": self._step_seconds() * max(0, total - step)}
        unknown = []
        for what, count in self._to_come(step, total).items():
            seconds = self.mean(what)
            name = what if what == EVALUATION else f"{what}s"
            if count and seconds is None:
                unknown.append(name)
            elif count and seconds is not None:
                parts[name] = count * seconds
        return Remaining(parts, tuple(unknown))

    def _to_come(self, step: int, total: int) -> dict[str, int]:
        counts = {}
        for what in (LOOK, CHECKPOINT):
            first = max(step, self._last.get(what, -1) + 1)
            counts[what] = sum(self.schedule.due(what, one, total) for one in range(first, total + 1))
        return {**counts, EVALUATION: int(self.schedule.evaluation_looks > 0 and EVALUATION not in self._last)}

    def _step_seconds(self) -> float:
        # the first step warms caches up: it stands for the others only where there is no other
        steps = [seconds for seconds in self._steps if seconds is not self._first] or self._steps
        return statistics.fmean(sum(seconds.values()) for seconds in steps) if steps else 0.0
