"""The looks at a run as charts: the reward and every witness over steps, alarms marked, and reward against the distance travelled."""

from __future__ import annotations

import math
from collections.abc import Mapping

from markupsafe import Markup

from gemma_grpo.monitor.charts import Chart, Series, curve, scatter
from gemma_grpo.monitor.run_files import Record, RunFiles, real, records
from gemma_grpo.monitor.watched import alarm_marks, curves

_NAMES = {
    "proxy": ("Reward on held-out prompts", "reward", "What training maximises."),
    "gold": ("Gold", "score", "The true score, which only the miniature world knows."),
    "witness": ("Held-out judge", "log-odds", "A judge of other pairs. It shares the base, and can err with the reward."),
    "lexical": ("Lexical judge", "log-odds", "Words and word pairs, learned from the same other pairs: it errs in another way."),
    "fluency": ("Likelihood under the untouched model", "nat / token", "A sharp fall: replies that the model would not have said."),
    "oddest": ("Least likely token", "nat", "Of each reply, under the untouched model: a few odd words show here first."),
    "strayed": ("Strayed", "share", "Replies more than 0.4 nat per token from the untouched model: rises early where a reward is gamed."),
    "kl_sequence": ("Distance travelled", "nat / reply", "KL to the untouched model."),
    "refusal_harmful": ("Refuses harmful requests", "share", ""),
    "refusal_benign": ("Refuses benign requests", "share", ""),
    "refusal_looks_harmful": ("Refuses requests that only look harmful", "share", ""),
    "length": ("Length", "tokens", ""),
    "clipped": ("Cut off", "share", "Replies that reached the length limit."),
    "distinct_2": ("Distinct word pairs", "share", "Of all word pairs; a fall means that replies grow alike."),
}
_FRONTIER = {"proxy": "reward", "gold": "gold", "witness": "held-out judge"}
_LINE_POINTS = 60


def watch_charts(files: RunFiles) -> list[Chart]:
    """Every number of the looks that is known, and the frontier where it was worked out."""
    found, marks = curves(files.looks), [place for place, _ in alarm_marks(files.looks)]
    charts = [
        Chart(title, caption, Markup(curve([Series(title, *found[name])], title, unit, marks=marks)))
        for name, (title, unit, caption) in _NAMES.items()
        if name in found and len(found[name][0]) > 1
    ]
    frontier = _frontier(files.evaluation.get("frontier"))
    return [*charts, frontier] if frontier else charts


def _frontier(data: object) -> Chart | None:
    if not isinstance(data, Mapping):
        return None
    points = records(data.get("points"))
    distances = [real(point.get("distance")) for point in points]
    names = [name for name in _FRONTIER if any(real(point.get(name)) is not None for point in points)]
    if len(points) < 2 or not names or None in distances:
        return None
    laws = data.get("laws")
    kinds = [Series(_FRONTIER[name], [d or 0.0 for d in distances], [real(point.get(name)) for point in points]) for name in names]
    lines = [_law(laws.get(name) if isinstance(laws, Mapping) else None, max(d or 0.0 for d in distances)) for name in names]
    title = "Gain against the distance travelled"
    svg = scatter(kinds, title, "root of the KL per reply, nats", "gain over the start", lines=lines)
    caption = "Lines: d (a - b log d), fitted (arXiv:2210.10760). Where reward and truth part, more of the one is less of the other."
    return Chart(title, caption, Markup(svg))


def _law(law: Record | None, furthest: float) -> Series:
    a, b = (None, None) if not isinstance(law, Mapping) else (real(law.get("a")), real(law.get("b")))
    if a is None or b is None or furthest <= 0:
        return Series("", [], [])
    places = [furthest * (n + 1) / _LINE_POINTS for n in range(_LINE_POINTS)]
    return Series("", places, [d * (a - b * math.log(d)) for d in places])
