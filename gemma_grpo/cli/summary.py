"""calibration.json, evaluation.json and events.jsonl as lines to read. Runs nothing."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NAMES = {
    "gold": "gold score",
    "witness": "held-out judge",
    "reward": "reward (trained on)",
    "refusal_benign": "refusals, benign prompts",
    "refusal_harmful": "refusals, harmful prompts",
    "refusal_looks_harmful": "refusals, harmful looks",
    "length": "length in tokens",
    "kl": "KL, nat per token",
}
_REWARD_NAMES = {
    "accuracy_against_gold": "against the true score",
    "accuracy_zero_shot": "without training",
    "accuracy_lexical": "TF-IDF on the same",
    "longer_wins": "'the longer wins'",
}
_SHARES = ("refusal_benign", "refusal_harmful", "refusal_looks_harmful")
_WIDTH = max(map(len, _NAMES.values()))


def reward_lines(calibration: Mapping[str, Any]) -> list[str]:
    """How well the reward adapter tells the better reply, on pairs it was not trained on."""
    if not calibration:
        return []
    lines = [_row("reward adapter", f"right on {_accuracy(calibration['accuracy'])}, held out")]
    for key, name in _REWARD_NAMES.items():
        if calibration.get(key):
            lines.append(_row(f"  {name}", _accuracy(calibration[key])))
    return lines


def read_calibration(run_dir: Path) -> dict[str, Any]:
    """reward/calibration.json of a run; empty when it trained no reward adapter."""
    path = run_dir / "reward" / "calibration.json"
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return loaded


def evaluation_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """Before -> after of every metric that was measured, the gain with its 95 % interval."""
    lines = [_row(name, _change(evaluation[key], share=key in _SHARES)) for key, name in _NAMES.items() if _measured(evaluation.get(key))]
    win_rate = evaluation.get("win_rate")
    if isinstance(win_rate, Mapping) and _measured(win_rate):
        judge = f", judged by {win_rate['judge']}" if "judge" in win_rate else ""
        interval = _interval([0.5 + bound for bound in win_rate["interval"]], share=True) if win_rate.get("interval") else ""
        lines.insert(1, _row("win rate against before", f"{win_rate['after']:.1%}{interval}{judge}"))
    return lines


def task_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """Before -> after of every metric of the harness's tasks that were run."""
    tasks = evaluation.get("tasks") or {}
    return [_row(f"{task}, {name}", _change(one, share=False)) for task, metrics in tasks.items() for name, one in metrics.items()]


def time_line(run_dir: Path, total: float) -> str:
    """Where `total` seconds went, by the run's own events: stages, and the phases of all training steps together."""
    spent: dict[str, float] = defaultdict(float)
    with (run_dir / "events.jsonl").open(encoding="utf-8") as file:
        for event in map(json.loads, file):
            if event["kind"] == "phase" and "seconds" in event:
                spent[event["name"]] += event["seconds"]
            elif event["kind"] == "step_time":
                for name, seconds in event["seconds"].items():
                    spent[name] += seconds
    spent["everything else"] = max(0.0, total - sum(spent.values()))
    return _row("time", f"{total:.0f} s: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in spent.items()))


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
    before, after, gain = (round(metric[key], 6) + 0.0 for key in ("before", "after", "gain"))  # + 0.0: no "-0.000"
    return f"{before:{form}} -> {after:{form}}   gain {gain:+{form}}{interval}, {metric['n']} replies"


def _interval(bounds: list[float], *, share: bool) -> str:
    low, high = (f"{bound:.1%}" if share else f"{bound:.3g}" for bound in bounds)
    return f" [95 %: {low} to {high}]"


def canned_lines(canned: Mapping[str, Any] | None) -> list[str]:
    """What the rewards made of the replies that stand beside the prompts; none where there are no such replies."""
    if canned is None:
        return []
    lines = [f"canned replies: the good one above the bad one on {canned['won']} of {canned['prompts']} prompts"]
    if canned["too_long"]:
        lines[0] += f" ({canned['too_long']} more left out: the good one is longer than max_completion_length)"
    lines += [f"  {name:<16} good {good:+.2f}, bad {bad:+.2f} on average" for name, (good, bad) in canned["parts"].items()]
    lines += [f"  {name:<16} not asked: it is trained first" for name in canned["not_asked"]]
    return [*lines, *(f"  {warning}" for warning in canned["warnings"])]
