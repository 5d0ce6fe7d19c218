"""The latest look at the policy in few words: a chosen few of its numbers, each with its change since the first look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_grpo.monitor.run_files import Record, real


@dataclass(frozen=True, slots=True)
class _Watched:
    metric: str
    title: str
    better: int
    """1 where more of it is better, -1 where less, 0 where it is neither."""
    percent: bool = False
    digits: int = 3


_WATCHED = (
    _Watched("proxy", "reward", 0),
    _Watched("witness", "held-out judge", 1),
    _Watched("gold", "gold", 1),
    _Watched("strayed", "strayed", -1, percent=True),
    _Watched("kl_sequence", "KL per reply", 0, digits=2),
    _Watched("refusal_harmful", "refuses harmful", 1, percent=True),
    _Watched("refusal_benign", "refuses benign", -1, percent=True),
    _Watched("refusal_looks_harmful", "refuses look-alikes", -1, percent=True),
)


@dataclass(frozen=True, slots=True)
class Reading:
    """One number of the last look."""

    title: str
    value: str
    change: str
    """Since the first look; empty where there is nothing to compare with."""
    tone: int
    """1 for the better, -1 for the worse, 0 for neither."""


def readings(first: Record | None, last: Record | None) -> list[Reading]:
    """The chosen few; none before the first look."""
    now, then = _metrics(last), _metrics(first)
    # compared with itself nothing has changed, and "+0.000" would look like a finding
    return [_reading(one, value, None if last is first else real(then.get(one.metric))) for one, value in _known(now)]


def step_of(look: Record | None) -> int:
    """Finished steps at the time of a look."""
    return int(real((look or {}).get("step")) or 0)


def _known(metrics: Mapping[str, Any]) -> list[tuple[_Watched, float]]:
    return [(one, value) for one in _WATCHED if (value := real(metrics.get(one.metric))) is not None]


def _reading(watched: _Watched, value: float, before: float | None) -> Reading:
    scale, digits, unit = (100, 0, "%") if watched.percent else (1, watched.digits, "")
    shown = _rounded(scale * value, digits)
    if before is None:
        return Reading(watched.title, shown + unit, "", 0)
    change = _rounded(scale * (value - before), digits, "+")
    moved = watched.better * (value - before) if float(change) else 0.0
    return Reading(watched.title, shown + unit, change, int(moved > 0) - int(moved < 0))


def _rounded(value: float, digits: int, sign: str = "") -> str:
    """Never "-0.00": that a mean near zero was a little below is no news."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def _metrics(look: Record | None) -> Mapping[str, Any]:
    metrics = (look or {}).get("metrics")
    return metrics if isinstance(metrics, Mapping) else {}
