"""The reward and its witnesses against the distance that the policy travelled, with the laws fitted to them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from markupsafe import Markup

from gemma_grpo.monitor.charts import Chart, Series, scatter
from gemma_grpo.monitor.run_files import Record, real, records

_FRONTIER = {"proxy": "reward", "gold": "gold", "witness": "held-out judge"}
_LINE_POINTS = 60


def frontier_chart(data: object) -> Chart | None:
    """The `frontier` of evaluation.json; None where it was not worked out."""
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
