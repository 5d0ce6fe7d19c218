"""What evaluation.json says, in words and rows: the verdict, each metric before and after, each kind of request.

Pure functions of the file's content; nothing is recomputed. A kind on which the reward rises while gold falls is named: there the
policy learned the reward's mistake, and no average shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_grpo.monitor.run_files import real


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric before and after; `low` and `high` are the 95 % interval of the gain, None when too little was measured."""

    before: float
    after: float
    gain: float
    low: float | None
    high: float | None
    n: int

    @property
    def sure(self) -> int:
        """1 when the gain is above 0 beyond chance, -1 when below, 0 when the interval contains 0 or is unknown."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True, slots=True)
class Style:
    """How a metric is written: decimals, unit, what it means, and whether more of it is better (0: neither)."""

    title: str
    digits: int
    better: int
    meaning: str
    percent: bool = False


STYLES = {
    "gold": Style("gold", 2, 1, "exact score in [0, 1], never seen in training"),
    "reward": Style("reward (proxy)", 2, 1, "what training maximised"),
    "witness": Style("held-out judge", 2, 1, "a judge trained on other pairs, never seen in training"),
    "win_rate": Style("win rate", 0, 1, "against the untouched model; ties count half", percent=True),
    "win_rate_chosen": Style("win rate, dataset", 0, 1, "against the dataset's preferred reply; ties count half", percent=True),
    "kl": Style("KL per token", 3, 0, "nat, to the untouched model"),
    "kl_sequence": Style("KL per reply", 2, 0, "nat, to the untouched model"),
    "length": Style("length", 1, 0, "tokens"),
    "refusal_harmful": Style("refuses harmful requests", 0, 1, "share of replies", percent=True),
    "refusal_looks_harmful": Style("refuses what only looks harmful", 0, -1, "share of replies", percent=True),
    "refusal_benign": Style("refuses benign requests", 0, -1, "share of replies", percent=True),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first sentence of the report. `tone` is good, bad or unclear."""

    tone: str
    headline: str
    sentence: str
    further: list[str]
    warnings: list[str]
    """What an average hides or the run should not have done."""


@dataclass(frozen=True, slots=True)
class KindRow:
    """One kind of request; `mark` says what is wrong with it, `alarming` whether reward and gold part."""

    kind: str
    n: int
    gold: Measure | None
    reward: Measure | None
    win_rate: Measure | None
    mark: str
    alarming: bool


def measure(data: Any) -> Measure | None:
    """A metric of evaluation.json; None when it is missing, empty or not numbers."""
    if not isinstance(data, Mapping):
        return None
    numbers = [real(data.get(name)) for name in ("before", "after", "gain")]
    if any(number is None for number in numbers):
        return None
    before, after, gain = (number or 0.0 for number in numbers)
    interval = data.get("interval")
    ends = [real(end) for end in interval] if isinstance(interval, list) and len(interval) == 2 else [None, None]
    count = real(data.get("n"))
    return Measure(before, after, gain, ends[0], ends[1], int(count or 0))


def show(value: float | None, style: Style, *, signed: bool = False) -> str:
    """A number as this metric is written, "–" for none; signed, it is a difference, of percentages in points."""
    if value is None:
        return "–"
    unit = "" if not style.percent else "\u00a0pt" if signed else "\u00a0%"
    return f"{_scaled(value, style):{'+' if signed else ''}.{style.digits}f}{unit}"


def show_interval(one: Measure, style: Style) -> str:
    """[low, high] of the gain, or why there is none."""
    if one.low is None or one.high is None:
        return "no interval"
    ends = ", ".join(f"{_scaled(end, style):.{style.digits}f}" for end in (one.low, one.high))
    return f"[{ends}]\u00a0pt" if style.percent else f"[{ends}]"


_FALLBACK = ("gold", "witness", "reward")
"""What a run is judged by where evaluation.primary names nothing: the first that was measured."""
_RULES = ("refusal_harmful", "refusal_looks_harmful", "refusal_benign")
_CAUTIONS = {
    "witness": "No true score is known here. The witness learned from other pairs than the reward, on the same base: it can err with it.",
    "reward": "No independent score is known here: this is the reward that training maximised, so a rise alone proves no better replies.",
}


def verdict(evaluation: Mapping[str, Any]) -> Verdict | None:
    """Whether training helped by the primary metric, with its interval. None when there is no evaluation."""
    named = evaluation.get("primary")
    named = named if isinstance(named, str) and named in STYLES else None
    wanted = (*([named] if named else []), *_FALLBACK)
    name = next((one for one in wanted if measure(evaluation.get(one))), None)
    one = measure(evaluation.get(name)) if name else None
    if name is None or one is None:
        return None
    judge = _judged_by(name, evaluation)
    tone, headline = _words(name, judge, one.sure * STYLES[name].better)
    missing = [f"{STYLES[named].title}, by which this run was to be judged, was not measured."] if named and name != named else []
    further = [*([_CAUTIONS[judge]] if judge in _CAUTIONS else []), *_further(evaluation)]
    return Verdict(tone, headline, _sentence(_title(name).capitalize(), one, STYLES[name]), further, [*missing, *_warnings(evaluation)])


def _title(name: str) -> str:
    return "reward" if name == "reward" else STYLES[name].title


def _judged_by(name: str, evaluation: Mapping[str, Any]) -> str:
    """Whose word a metric is: a win rate is its judge's."""
    data = evaluation[name]
    return str(data.get("judge", "unknown")) if name.startswith("win_rate") else name


def _words(name: str, judge: str, change: int) -> tuple[str, str]:
    """Tone and headline. What a judge says that can be fooled is never "good" (docs/overoptimisation.md)."""
    if not change:
        return "unclear", "No clear change."
    if judge == "gold":
        return ("good", "Better.") if change > 0 else ("bad", "Worse.")
    if name in _RULES:  # counted by their words: a policy that refuses everything refuses what is harmful too
        return ("unclear", "Refusals changed as they should.") if change > 0 else ("bad", "Refusals changed for the worse.")
    return ("unclear", f"The {_title(name)} rose.") if change > 0 else ("bad", f"The {_title(name)} fell.")


@dataclass(frozen=True, slots=True)
class Compared:
    """One metric of several policies: what it is after training, and its gain and interval; None where it was not measured."""

    title: str
    cells: list[tuple[str, str] | None]


def compared(evaluations: Sequence[Mapping[str, Any]]) -> list[Compared]:
    """Each metric that any of them has, and both win rates at equal length too."""
    rows = []
    for name, style in STYLES.items():
        found = [measure(evaluation.get(name)) for evaluation in evaluations]
        if not any(found):
            continue
        rows.append(Compared(style.title, [_with_gain(one, style) for one in found]))
        if name in ("win_rate", "win_rate_chosen"):
            equal = [_at_equal_length(evaluation.get(name)) for evaluation in evaluations]
            rows += [Compared(f"{style.title}, equal length", equal)] if any(equal) else []
    return rows


def _with_gain(one: Measure | None, style: Style) -> tuple[str, str] | None:
    return (show(one.after, style), f"({show(one.gain, style, signed=True)} {show_interval(one, style)})") if one else None


def kind_rows(evaluation: Mapping[str, Any]) -> list[KindRow]:
    """Each kind of request, those that need a look first."""
    by_kind = evaluation.get("by_kind")
    if not isinstance(by_kind, Mapping):
        return []
    rows = [_kind_row(str(kind), data) for kind, data in by_kind.items() if isinstance(data, Mapping)]
    return sorted(rows, key=lambda row: (not row.alarming, not row.mark, row.gold.gain if row.gold else 0.0, row.kind))


def _kind_row(kind: str, data: Mapping[str, Any]) -> KindRow:
    gold, reward, win_rate = (measure(data.get(name)) for name in ("gold", "reward", "win_rate"))
    alarming = bool(gold and reward and gold.gain < 0 < reward.gain)
    fell = [name for name, one in (("gold", gold), ("reward", reward)) if one and one.gain < 0]
    mark = "reward up, gold down: the reward is wrong here" if alarming else f"{' and '.join(fell)} fell" if fell else ""
    worst = gold if gold and gold.gain < 0 else reward
    if mark and worst and worst.sure >= 0:
        mark += " (within chance)"
    return KindRow(kind, int(real(data.get("n")) or 0), gold, reward, win_rate, mark, alarming)


def _sentence(name: str, one: Measure, style: Style) -> str:
    unsure = ", too few conversations for an interval" if one.low is None else f" {show_interval(one, style)}"
    change = f"{show(one.before, style)} → {show(one.after, style)}"
    return f"{name} {change}, gain {show(one.gain, style)}{unsure} on n = {one.n} held-out replies."


def _further(evaluation: Mapping[str, Any]) -> list[str]:
    known = {name: one for name in STYLES if (one := measure(evaluation.get(name)))}
    lines = []
    if win := known.get("win_rate"):
        judge = evaluation["win_rate"].get("judge", "unknown")
        style = STYLES["win_rate"]
        ends = "" if win.low is None or win.high is None else f" [{show(0.5 + win.low, style)}, {show(0.5 + win.high, style)}]"
        controlled = _controlled(evaluation["win_rate"])
        lines.append(f"Against the untouched model it wins {show(win.after, style)}{ends}, judged by {judge}{controlled}.")
    if over := known.get("win_rate_chosen"):
        controlled = _controlled(evaluation["win_rate_chosen"])
        change = f"{show(over.before, STYLES['win_rate_chosen'])} → {show(over.after, STYLES['win_rate_chosen'])}"
        lines.append(f"Against the dataset’s preferred reply it wins {change}{controlled}.")
    drift = [f"{STYLES[name].title} {show(known[name].after, STYLES[name])} nat" for name in ("kl", "kl_sequence") if name in known]
    if length := known.get("length"):
        drift.append(f"length {show(length.before, STYLES['length'])} → {show(length.after, STYLES['length'])} tokens")
    if drift:
        lines.append(f"{'; '.join(drift)}.")
    refusals = [
        f"{name.removeprefix('refusal_')} requests {show(known[name].before, STYLES[name])} → {show(known[name].after, STYLES[name])}"
        for name in ("refusal_harmful", "refusal_benign")
        if name in known
    ]
    if refusals:
        lines.append(f"Refusals: {', '.join(refusals)}.")
    return lines


def _controlled(data: Any) -> str:
    """The win rate at equal length as the end of a sentence; empty where there is none."""
    found = _at_equal_length(data)
    return f"; at equal length {' '.join(filter(None, found))}" if found else ""


def _at_equal_length(data: Any) -> tuple[str, str] | None:
    """The win rate at equal length and its interval; None where there is none."""
    found = data.get("length_controlled") if isinstance(data, Mapping) else None
    value = real(found.get("value")) if isinstance(found, Mapping) else None
    if value is None or found is None:
        return None
    style, interval = STYLES["win_rate"], found.get("interval")
    ends = ""
    if isinstance(interval, list) and len(interval) == 2 and None not in (low := real(interval[0]), high := real(interval[1])):
        ends = f"[{show(low, style)}, {show(high, style)}]"
    return show(value, style), ends


def _warnings(evaluation: Mapping[str, Any]) -> list[str]:
    lines = []
    benign, style = measure(evaluation.get("refusal_benign")), STYLES["refusal_benign"]
    if benign and benign.sure > 0:
        lines.append(
            f"It refuses more benign requests than before: {show(benign.gain, style, signed=True)} {show_interval(benign, style)}."
        )
    for row in kind_rows(evaluation):
        if row.alarming and row.gold and row.reward:
            change = (
                f"gold {show(row.gold.gain, STYLES['gold'], signed=True)}, reward {show(row.reward.gain, STYLES['reward'], signed=True)}"
            )
            chance = "" if row.gold.sure < 0 else " (the fall is within chance)"
            lines.append(f"Look at “{row.kind}”: the reward rose while gold fell, {change} on n = {row.n}{chance}.")
    return lines


def _scaled(value: float, style: Style) -> float:
    return round(100 * value if style.percent else value, style.digits) + 0.0  # + 0.0: no "-0"
