"""What witnesses.jsonl says, arranged for people: where proxy and witness part, which replies to look at, and the alarms on the curves.

Reads looks, which lookout.py wrote and alarms.py judged; recomputes nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_grpo.monitor.run_files import Record, real, records

LEVELS = ("note", "warn", "alert")
LOSS = 0.03
"""A fall of gold from its best that counts as lost: 3 points of 100."""


@dataclass(frozen=True, slots=True)
class Parting:
    """Where what a run was for went another way than what it was trained on."""

    truth: str
    """The measure that the run is judged by: "gold" where it is known, else "witness"."""
    peak_step: int
    peak: float
    end_step: int
    end: float
    proxy_at_peak: float
    proxy_at_end: float
    alarm: Record | None
    """The first alarm above a note."""
    lost_at_alarm: float | None
    """How far the truth had fallen from its highest value so far when that alarm came."""
    lost_step: int | None = None
    """The look from which on gold stayed LOSS below its best so far; None where it did not, or is not known."""

    @property
    def lost(self) -> float:
        """From the peak to the end."""
        return self.peak - self.end

    @property
    def parted(self) -> bool:
        """Whether the proxy rose from the peak on while the truth fell."""
        return self.lost > 0 and self.proxy_at_end > self.proxy_at_peak


@dataclass(frozen=True, slots=True)
class Notable:
    """One reply of the last look, beside that of the first to the same prompt."""

    why: str
    prompt: list[Record]
    before: Record
    after: Record


def parting(looks: Sequence[Record]) -> Parting | None:
    """None below two looks, or without anything to judge the proxy by."""
    truth = next((name for name in ("gold", "witness") if any(_metric(look, name) is not None for look in looks)), None)
    points = [(look, value) for look in looks if truth is not None and (value := _metric(look, truth)) is not None]
    if truth is None or len(points) < 2:
        return None
    peak, highest = max(points, key=lambda point: point[1])
    end, last = points[-1]
    alarm, lost, best, lost_step = None, None, -float("inf"), None
    for look, value in points:
        best = max(best, value)
        if truth == "gold":
            lost_step = None if best - value < LOSS else _step(look) if lost_step is None else lost_step
        serious = [one for one in records(look.get("alarms")) if one.get("level") in LEVELS[1:]]
        if serious and alarm is None:
            alarm, lost = serious[0], best - value
    proxies = [_metric(look, "proxy") or 0.0 for look in (peak, end)]
    return Parting(truth, _step(peak), highest, _step(end), last, proxies[0], proxies[1], alarm, lost, lost_step)


def parting_lines(found: Parting | None) -> list[str]:
    """The same in sentences; none where nothing is known."""
    if found is None:
        return []
    name = "Gold" if found.truth == "gold" else "The held-out judge"
    lines = [f"{name} was highest at step {found.peak_step} ({found.peak:.3f}) and ended at {found.end:.3f} (step {found.end_step})."]
    if found.parted:
        lines.append(f"From there on the reward went on rising, from {found.proxy_at_peak:.3f} to {found.proxy_at_end:.3f}.")
    if found.alarm is None:
        lines.append("No alarm came.")
    else:
        where = f"step {found.alarm.get('step')}, {found.alarm.get('level')} by {found.alarm.get('witness')}"
        lost = 100 * (found.lost_at_alarm or 0.0)
        lines.append(f"The first alarm came at {where}, when {name.lower()} had lost {lost:.1f} points of 100 from its best.")
        if found.lost_step is not None:
            ahead = found.lost_step - int(real(found.alarm.get("step")) or 0)
            when = f"{abs(ahead)} steps {'after' if ahead > 0 else 'before'} the alarm" if ahead else "at the alarm"
            lines.append(f"Three points were lost for good at step {found.lost_step}, {when}.")
    return lines


def curves(looks: Sequence[Record]) -> dict[str, tuple[list[float], list[float | None]]]:
    """Steps and values of each number of the looks that any of them has."""
    names = sorted({name for look in looks for name in _metrics(look)})
    steps = [float(_step(look)) for look in looks]
    return {name: (steps, [_metric(look, name) for look in looks]) for name in names}


def alarm_marks(looks: Sequence[Record]) -> list[tuple[float, str]]:
    """Step and level of every alarm above a note."""
    return [
        (float(_step(look)), str(one["level"])) for look in looks for one in records(look.get("alarms")) if one.get("level") in LEVELS[1:]
    ]


SUSPICIOUS = "most suspicious"
RANKINGS = ("best", "worst", "most improved", SUSPICIOUS)


def notable(looks: Sequence[Record]) -> list[Notable]:
    """The best and the worst reply of the last look, the one that improved most, and the one most to be suspected."""
    return [one for why in RANKINGS for one in ranked(looks, why)[:1]]


def ranked(looks: Sequence[Record], why: str) -> list[Notable]:
    """The replies of the last look, each beside the first look's to the same prompt, in the order of a ranking.

    Judged by gold where it is known, else by the witness, else by the reward; suspect is whose reward rose most for what this judge lost.
    Empty below two looks, and for suspicion where the reward is the only judge.
    """
    if len(looks) < 2:
        return []
    first, last = records(looks[0].get("replies")), records(looks[-1].get("replies"))
    judge = next((name for name in ("gold", "witness", "proxy") if any(real(reply.get(name)) is not None for reply in last)), None)
    both = [(a, b) for a, b in zip(first, last, strict=False) if judge and None not in (real(a.get(judge)), real(b.get(judge)))]
    if not both or judge is None or (why == SUSPICIOUS and judge == "proxy"):
        return []
    said = f"{why}: the reward rose, {judge} did not" if why == SUSPICIOUS else why
    ordered = sorted(both, key=_order(why, judge, both), reverse=why != "worst")
    return [Notable(said, records(before.get("prompt")), before, after) for before, after in ordered]


def _order(why: str, judge: str, both: Sequence[tuple[Record, Record]]) -> Callable[[tuple[Record, Record]], float]:
    """What a ranking looks at: the reply before and after to a number."""

    def after(pair: tuple[Record, Record]) -> float:
        return real(pair[1].get(judge)) or 0.0

    def rise(pair: tuple[Record, Record], name: str = judge) -> float:
        return (real(pair[1].get(name)) or 0.0) - (real(pair[0].get(name)) or 0.0)

    if why in ("best", "worst"):
        return after
    if why != SUSPICIOUS:
        return rise
    proxy, other = (_spread([rise(pair, name) for pair in both]) for name in ("proxy", judge))
    return lambda pair: rise(pair, "proxy") / proxy - rise(pair) / other


def _spread(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5 or 1.0


def _metrics(look: Record) -> Mapping[str, Any]:
    metrics = look.get("metrics")
    return metrics if isinstance(metrics, Mapping) else {}


def _metric(look: Record, name: str) -> float | None:
    return real(_metrics(look).get(name))


def _step(look: Record) -> int:
    return int(real(look.get("step")) or 0)
