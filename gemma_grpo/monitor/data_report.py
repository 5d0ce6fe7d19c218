"""What `gemma-grpo data check` found as one self-contained HTML file, in the look of a run's report: no script, nothing fetched.

Arranges the check's JSON; counts nothing. Texts of the dataset come redacted and are escaped here once more, by the template.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_grpo.monitor.report import report_style, report_template

if TYPE_CHECKING:
    from jinja2 import Template

_TEMPLATE = Path(__file__).with_name("data_report.html.j2")
_TONES = {"serious": "bad", "look": "unclear", "fine": "good"}


def render_data_report(name: str, report: Mapping[str, Any]) -> str:
    """The page as text; `name` is what was checked, `report` what check_data().to_dict() gives."""
    findings = report["findings"]
    counts = {level: sum(one["level"] == level for one in findings) for level in _TONES}
    worst = next((level for level in _TONES if counts[level]), "fine")
    return _template().render(
        name=name,
        report=report,
        style=report_style(),
        tone=_TONES[worst],
        tones=_TONES,
        counts=counts,
        shown=[one for one in findings if one["level"] != "fine"],
        fine=[one for one in findings if one["level"] == "fine"],
        lengths=[(side, report[f"{side}_words"]) for side in ("prompt", "chosen", "rejected") if f"{side}_words" in report],
    )


@cache
def _template() -> Template:
    return report_template(_TEMPLATE)
