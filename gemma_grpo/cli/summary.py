"""calibration.json, evaluation.json and events.jsonl as lines to read. Runs nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NAMES = {
    "gold": "gold score",
    "reward": "reward (what was trained on)",
    "refusal_benign": "refusals on benign prompts",
    "refusal_harmful": "refusals on harmful prompts",
    "length": "length in tokens",
    "kl": "KL to the model before, nat per token",
}
_SHARES = ("refusal_benign", "refusal_harmful")
_WIDTH = max(map(len, _NAMES.values()))


def reward_lines(calibration: Mapping[str, Any]) -> list[str]:
    """How well the reward adapter tells the better reply, on pairs it was not trained on."""
    lines = [_row("reward adapter", f"right on {_accuracy(calibration['accuracy'])} of held-out pairs")]
    for key, name in (("accuracy_zero_shot", "without training"), ("longer_wins", "'the longer one' would be")):
        if calibration.get(key):
            lines.append(_row(f"  {name}", _accuracy(calibration[key])))
    return lines


def evaluation_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """Before -> after of every metric that was measured, the gain with its 95 % interval."""
    lines = [_row(name, _change(evaluation[key], share=key in _SHARES)) for key, name in _NAMES.items() if _measured(evaluation.get(key))]
    win_rate = evaluation.get("win_rate")
    if isinstance(win_rate, Mapping) and _measured(win_rate):
        judge = f", judged by {win_rate['judge']}" if "judge" in win_rate else ""
        interval = _interval([0.5 + bound for bound in win_rate["interval"]], share=True) if win_rate.get("interval") else ""
        lines.insert(1, _row("win rate against before", f"{win_rate['after']:.1%}{interval}{judge}"))
    return lines


def time_line(run_dir: Path, seconds: Mapping[str, float]) -> str:
    """Where the time went: `seconds` by stage, training split into its phases by the run's own events."""
    phases: Counter[str] = Counter()
    events = run_dir / "events.jsonl"
    if events.is_file():
        with events.open(encoding="utf-8") as file:
            for line in file:
                phases.update(json.loads(line).get("seconds", {}) if '"step_time"' in line else {})
    split = ", ".join(f"{name} {duration:.0f}" for name, duration in phases.most_common())
    parts = [f"{name} {duration:.0f} s" + (f" ({split})" if name == "training" and split else "") for name, duration in seconds.items()]
    return _row("time", f"{sum(seconds.values()):.0f} s: " + ", ".join(parts))


def _row(name: str, text: str) -> str:
    return f"{name:<{_WIDTH}}  {text}"


def _measured(metric: Any) -> bool:
    return isinstance(metric, Mapping) and bool(metric.get("n")) and metric.get("after") is not None


def _accuracy(metric: Mapping[str, Any]) -> str:
    interval = _interval(metric["interval"], share=True) if metric.get("interval") else ""
    return f"{metric['value']:.1%}{interval}" + (f", {metric['n']} pairs" if metric.get("n") else "")


def _change(metric: Mapping[str, Any], *, share: bool) -> str:
    form = ".1%" if share else ".3g" if abs(metric["after"]) >= 10 else ".3f"
    interval = _interval(metric["interval"], share=share) if metric.get("interval") else ""
    return f"{metric['before']:{form}} -> {metric['after']:{form}}   gain {metric['gain']:+{form}}{interval}, {metric['n']} replies"


def _interval(bounds: list[float], *, share: bool) -> str:
    low, high = (f"{bound:.1%}" if share else f"{bound:.3g}" for bound in bounds)
    return f" [95 %: {low} to {high}]"
