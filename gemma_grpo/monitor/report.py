"""A run directory as one self-contained HTML file: no script, nothing fetched, and the same files give the same bytes.

Arranges what run_files.py read and findings.py judged; the look is report.html.j2, the curves charts.py. Text of models and data is
escaped by the template and stripped of control characters by the `text` filter.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from gemma_grpo.containment import link_out
from gemma_grpo.escapes import visible
from gemma_grpo.monitor import findings, watched
from gemma_grpo.monitor.charts import Chart, calibration_curve
from gemma_grpo.monitor.frontier_chart import frontier_chart
from gemma_grpo.monitor.profile_table import TITLE, profile_notes, profile_rows
from gemma_grpo.monitor.run_charts import Lines, charts, training_panels, watched_panels
from gemma_grpo.monitor.run_files import Record, RunFiles, read_run_files, real, records
from gemma_grpo.monitor.votes import tally, tally_line

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_STYLES = ("colours.css", "report.css")
_SHOWN_GROUPS = 3
_TOLD_EVENTS = ("warn", "rollback", "error", "note")


def write_report(run_dir: str | Path) -> Path:
    """Write report.html into the run directory and return its path. What is missing there is said in the report.

    Raises ValueError when the path is no run directory or a link in it leads outside, OSError when the file cannot be written.
    """
    link = link_out(Path(run_dir))
    if link:
        raise ValueError(link)
    target = Path(run_dir) / "report.html"
    html = render_report(read_run_files(run_dir))
    if target.is_file() and target.read_bytes() == html.encode():  # nothing of a run changes that has nothing new to tell
        return target
    temporary = target.with_name(f".report.html.{os.getpid()}.tmp")  # of its own: a run ends while its user asks for a report
    try:
        temporary.write_text(html, encoding="utf-8", newline="\n")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def render_report(files: RunFiles) -> str:
    """The page as text."""
    return _template().render(_context(files))


@cache
def _template() -> Template:
    return report_template(_TEMPLATE)


def report_template(path: Path) -> Template:
    """A template in which every value is escaped, with the filters that make a dataset's text and numbers readable and harmless."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"text": _text, "number": _number, "score": _score, "share": _share, "listed": _listed}
    environment.filters |= {"when": _when, "duration": _duration}
    environment.filters["records"] = records
    return environment.from_string(path.read_text(encoding="utf-8"))


def report_style() -> Markup:
    """The look that all reports share, as CSS."""
    return Markup("".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in _STYLES))


def _context(files: RunFiles) -> dict[str, Any]:
    calibration = files.calibration
    baselines = _mappings(files.evaluation.get("baselines"))
    lines = Lines(files.name, files.metrics, files.looks)
    frontier = frontier_chart(files.evaluation.get("frontier"))
    return {
        "files": files,
        "style": report_style(),
        "verdict": findings.verdict(files.evaluation),
        "measures": _measures(files.evaluation),
        "arms": ["this run", *baselines],
        "votes": tally_line(voted) if (voted := tally(files.votes)) else "",
        "compared": findings.compared([files.evaluation, *baselines.values()]) if baselines else [],
        "abilities": _abilities(files.evaluation),
        "kinds": findings.kind_rows(files.evaluation),
        "strip": _strip(files.evaluation),
        "styles": findings.STYLES,
        "show": findings.show,
        "show_interval": findings.show_interval,
        "accuracies": _accuracies(calibration),
        "calibration_chart": _calibration_chart(calibration),
        "curves": charts(training_panels(files.metrics), lines),
        "watched_charts": [*charts(watched_panels(files.looks), lines), *([frontier] if frontier else [])],
        "parting": watched.parting_lines(watched.parting(files.looks)),
        "alarms": [one for look in files.looks for one in records(look.get("alarms"))],
        "serious": len(watched.alarm_marks(files.looks)),
        "notable": watched.notable(files.looks),
        "phases": _phases(files),
        "profile_title": TITLE,
        "profile_rows": profile_rows(files.profile),
        "profile_notes": profile_notes(files.profile) if files.profile else [],
        "groups": [*map(_group, _widest(files.last_groups)), *map(_group, _widest(files.first_groups)[:1] if _many_steps(files) else ())],
        "samples": records(files.evaluation.get("samples")),
        "told": [event for event in files.events if event.get("kind") in _TOLD_EVENTS][-40:],
        "data": _flat(files.run.get("data")),
        "versions": _flat(files.run.get("versions")),
    }


def _measures(evaluation: Record) -> list[tuple[findings.Style, findings.Measure, str]]:
    """Style, numbers, and good, bad or empty for each metric that was measured."""
    rows = []
    for name, style in findings.STYLES.items():
        one = findings.measure(evaluation.get(name))
        if one:
            rows.append((style, one, {1: "good", -1: "bad"}.get(one.sure * style.better, "")))
    return rows


def _abilities(evaluation: Record) -> list[tuple[findings.Style, findings.Measure, str]]:
    """Style, numbers, and good, bad or empty for each metric of the harness's tasks that were run."""
    rows = []
    for task, metrics in _mappings(evaluation.get("tasks")).items():
        for name, data in metrics.items():
            if one := findings.measure(data):
                better = -1 if data.get("higher_is_better") is False else 1
                rows.append((findings.Style(f"{task}, {name}", 3, better, ""), one, {1: "good", -1: "bad"}.get(one.sure * better, "")))
    return rows


def _strip(evaluation: Record) -> Any:
    """Maps a gain and its interval to positions 0 to 100 on a strip whose middle is 0, the same for all kinds."""
    rows = findings.kind_rows(evaluation)

    def place(one: findings.Measure, which: str) -> tuple[float, float, float]:
        peers = [getattr(row, which) for row in rows]
        widest = max((abs(end) for peer in peers if peer for end in (peer.gain, peer.low or 0.0, peer.high or 0.0)), default=0.0) or 1.0
        low, high = (one.gain if end is None else end for end in (one.low, one.high))
        return round(50 + 48 * low / widest, 1), round(50 + 48 * one.gain / widest, 1), round(50 + 48 * high / widest, 1)

    return place


def _accuracies(calibration: Record) -> list[tuple[str, float, str, str]]:
    """Name, share, interval and number of pairs for each accuracy of the reward adapter."""
    named = [("reward adapter", "accuracy"), ("before training (zero-shot)", "accuracy_zero_shot"), ("longer reply wins", "longer_wins")]
    named += [("reward adapter, replies of closest length", "closest_length_quarter")]
    named += [("TF-IDF and logistic regression, same pairs", "accuracy_lexical"), ("members agree", "agreement")]
    named += [("reward adapter, conversations met once", "without_sibling")]
    entries = [(title, calibration.get(key)) for title, key in named]
    for group, said in (("by_source", ""), ("by_kind", ""), ("by_depth", "turns of the person: ")):
        parts = calibration.get(group)
        entries += [(f"reward adapter, {said}{name}", part) for name, part in parts.items()] if isinstance(parts, Mapping) else []
    rows = []
    for title, entry in entries:
        if not isinstance(entry, Mapping) or (value := real(entry.get("value"))) is None:
            continue
        interval = entry.get("interval")
        shown = (
            f"[{_share(interval[0])}, {_share(interval[1])}]".replace("\u00a0%", "", 1)
            if isinstance(interval, list) and len(interval) == 2
            else "–"
        )
        rows.append((title, value, shown, _number(entry.get("n"))))
    return rows


def _calibration_chart(calibration: Record) -> Chart | None:
    points = []
    for point in records(calibration.get("calibration")):
        predicted, observed, n = (real(point.get(key)) for key in ("predicted", "observed", "n"))
        if predicted is not None and observed is not None:
            points.append((predicted, observed, n or 0.0))
    if not points:
        return None
    title = "Calibration on held-out pairs"
    return Chart(title, "On the dashed line a probability means what it says.", Markup(calibration_curve(points, title)))


def _phases(files: RunFiles) -> list[tuple[str, float]]:
    """Seconds by phase: what came before training, all training steps, evaluation, and what the whole run took besides."""
    steps: dict[str, float] = {}
    stages: dict[str, float] = {}
    for event in files.events:
        seconds = event.get("seconds")
        if event.get("kind") == "step_time" and isinstance(seconds, Mapping):
            for name, value in seconds.items():
                steps[str(name)] = steps.get(str(name), 0.0) + (real(value) or 0.0)
        elif event.get("kind") == "phase" and (spent := real(seconds)):
            name = str(event.get("name"))
            stages[name] = stages.get(name, 0.0) + spent
    stages.setdefault("evaluation", real(files.evaluation.get("seconds")) or 0.0)
    evaluation = stages.pop("evaluation")
    sums = [*stages.items(), *steps.items(), *([("evaluation", evaluation)] if evaluation else [])]
    started, ended = real(files.run.get("started")), real(files.run.get("ended"))
    rest = ended - started - sum(spent for _, spent in sums) if started is not None and ended is not None else 0.0
    return [*sums, ("loading and the rest", rest)] if rest > 0 else sums


def _mappings(value: Any) -> dict[str, Record]:
    return {str(name): one for name, one in value.items() if isinstance(one, Mapping)} if isinstance(value, Mapping) else {}


def _many_steps(files: RunFiles) -> bool:
    return bool(files.first_groups and files.last_groups and files.first_groups[0].get("step") != files.last_groups[0].get("step"))


def _widest(groups: Sequence[Record]) -> list[Record]:
    """The groups whose rewards differ most: the ones a step learns from."""

    def spread(group: Record) -> float:
        rewards = [value for one in records(group.get("completions")) if (value := real(one.get("reward"))) is not None]
        return max(rewards) - min(rewards) if rewards else 0.0

    return sorted(groups, key=spread, reverse=True)[:_SHOWN_GROUPS]


def _group(line: Record) -> dict[str, Any]:
    """A line of samples.jsonl with its completions from best to worst."""
    completions = [dict(one) for one in records(line.get("completions"))]
    completions.sort(key=lambda one: -math.inf if (value := real(one.get("reward"))) is None else value, reverse=True)
    return {**line, "completions": completions}


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """A nested mapping as rows "dropped / empty_final_reply": 3."""
    if not isinstance(value, Mapping):
        return []
    rows: list[tuple[str, Any]] = []
    for key, item in value.items():
        rows += _flat(item, f"{prefix}{key} / ") if isinstance(item, Mapping) else [(f"{prefix}{key}", item)]
    return rows


def _text(value: Any) -> str:
    return visible("" if value is None else str(value))


def _number(value: Any) -> str:
    """Whole numbers with thin spaces between thousands, others to four digits."""
    number = real(value)
    if number is None:
        return "–"
    return f"{int(number):,}".replace(",", "\u202f") if number == int(number) else f"{number:.4g}"


def _listed(value: Any) -> str:
    return ", ".join(map(_text, value)) if isinstance(value, list) else _text(value)


def _score(value: Any) -> str:
    number = real(value)
    return "–" if number is None else f"{number:.3f}"


def _share(value: Any) -> str:
    number = real(value)
    return "–" if number is None else f"{100 * number:.1f}\u00a0%"


def _when(value: Any) -> str:
    number = real(value)
    if number is None:
        return _text(value) or "–"
    try:
        return datetime.fromtimestamp(number, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return "–"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
