"""profile.json as rows and sentences: one table for the terminal and the report.

The file's schema is profile/recorder.py's; like every file of a run it may be damaged, so each value is checked where it is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_grpo.monitor.run_files import Record, real

TITLE = "Where the time of a step goes, beside what this machine could do"
HEADER = ("phase", "seconds", "share", "floor", "x floor", "tokens", "tokens/s")
_NONE = "-"
_BUSY = 0.3
"""Repeats of one measurement differ by less on a machine that does nothing else."""


def profile_rows(profile: Record) -> list[list[str]]:
    """Header, phases, their sum, what was outside of the steps, and the whole session; no rows where no step was run."""
    phases = _mapping(profile.get("phases"))
    if not phases:
        return []
    rows = [list(HEADER), *(_row(str(name), _mapping(one)) for name, one in phases.items())]
    rows.append(_row(counted_steps(profile), {**_mapping(profile.get("total")), "share": 1.0}))
    outside = _mapping(profile.get("outside"))
    rows += [_row(str(name), {"seconds": seconds}) for name, seconds in outside.items() if real(seconds)]
    return [*rows, _row("all of it", {"seconds": profile.get("session_seconds")})]


def profile_notes(profile: Record) -> list[str]:
    """What the numbers mean, what they leave out, and what could be done."""
    steps = _mapping(profile.get("steps"))
    operations, reading = _mapping(profile.get("operations")), _mapping(profile.get("bytes"))
    notes = []
    if not _mapping(profile.get("phases")):
        notes.append("No step was run in this session, so there is nothing to compare with the floor.")
    if earlier := real(steps.get("earlier")):
        notes.append(f"The run's first {earlier:.0f} steps were made in an earlier session and are not in it.")
    notes.append(
        f"Measured here ({profile.get('device', 'unknown device')}, {profile.get('dtype', 'unknown dtype')}): "
        f"{_giga(operations.get('value'))} Gop/s in matrix products, {_giga(reading.get('value'))} GB/s read from memory; "
        f"repeats differed by up to {_percent(operations.get('spread'))} and {_percent(reading.get('spread'))}."
    )
    if max(real(one.get("spread")) or 0.0 for one in (operations, reading)) > _BUSY:
        notes.append("Something else kept this machine busy while it was measured: take the ratios with care.")
    notes.append("The floor is the time that the work counted from the real tokens takes at these rates (docs/method.md).")
    if advice := profile.get("advice"):
        notes.append(str(advice))
    return notes


def counted_steps(profile: Record) -> str:
    """What the row of their sum is called: steps 2 to 10."""
    counted = _mapping(profile.get("steps")).get("counted")
    numbers = [number for one in counted if (number := real(one)) is not None] if isinstance(counted, list) else []
    if len(numbers) != 2:
        return "steps"
    first, last = numbers
    return f"step {first:.0f}" if first == last else f"steps {first:.0f} to {last:.0f}"


def _row(name: str, one: Mapping[str, Any]) -> list[str]:
    tokens = real(one.get("tokens"))
    cells = [name, _seconds(one.get("seconds")), _percent(one.get("share")), _seconds(one.get("floor_seconds") or None)]
    cells += [_times(one.get("ratio")), f"{tokens:.0f}" if tokens else _NONE, _times(one.get("tokens_per_second"), 0)]
    return cells


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _seconds(value: Any) -> str:
    number = real(value)
    return _NONE if number is None else f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}" if abs(number) >= 0.1 else f"{number:.4f}"


def _percent(value: Any) -> str:
    number = real(value)
    return _NONE if number is None else f"{number:.1%}"


def _times(value: Any, digits: int = 1) -> str:
    number = real(value)
    return _NONE if number is None else f"{number:.{digits}f}"


def _giga(value: Any) -> str:
    number = real(value)
    return _NONE if number is None else f"{number / 1e9:.4g}"
