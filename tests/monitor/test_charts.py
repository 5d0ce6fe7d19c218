"""Laws of the charts: same numbers same bytes, readable text, nothing of a stranger's name obeyed."""

from __future__ import annotations

import html
import json
import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from gemma_grpo.monitor.charts import Series, calibration_curve, curve, scatter

SVG = "{http://www.w3.org/2000/svg}"


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in parse(svg).iter(f"{SVG}text")]


def lines(svg: str) -> int:
    """Drawn lines, known by their colour."""
    return svg.count('stroke="var(--chart-')


def test_the_same_numbers_give_the_same_bytes_in_another_process() -> None:
    code = "from gemma_grpo.monitor.charts import *; print(curve([Series('a', [1, 2], [3.0, 4.0], [1, 1])], 't', 'u'), end='')"
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert runs == {curve([Series("a", [1, 2], [3.0, 4.0], [1, 1])], "t", "u").encode()}


def test_text_stays_text_and_takes_the_pages_colour() -> None:
    svg = curve([Series("one", [1, 2, 3], [1, 2, 3])], "Reward", "nat / token", x_label="update")
    assert {"nat / token", "update"} <= set(texts(svg))
    assert "currentColor" in svg
    assert "#010203" not in svg


def test_two_lines_are_named_at_their_ends() -> None:
    svg = curve([Series("low", [1, 2], [0, 1]), Series("high", [1, 2], [0, 1])], "t", "u")
    assert {"low", "high"} <= set(texts(svg))
    assert lines(svg) == 2


@pytest.mark.parametrize("name", ["$x^{2}$", "$\\frac{", "<script>alert(1)</script>", "a & b", '"><img src=x>', "_hidden", "\x1b[2J\u202e"])
def test_names_of_strangers_are_shown_as_they_are(name: str) -> None:
    svg = curve([Series(name, [1, 2], [0, 1]), Series("b", [1, 2], [1, 0])], name, name, x_label=name)
    shown = "\\x1b[2J\\u202e" if name.startswith("\x1b") else name
    assert texts(svg).count(shown) == 3
    assert parse(svg).attrib["aria-label"] == shown


def test_gaps_and_wild_values_are_left_out() -> None:
    assert "nan" not in curve([Series("a", [1, 2, 3, 4, 5], [1, None, math.nan, math.inf, 2], [0, 0, 0, None, 0])], "t", "u").lower()
    assert lines(curve([Series("a", [1], [1])], "t", "u")) >= 1  # a single step is a dot
    curve([Series("a", [], [])], "t", "u")
    curve([Series("a", [1, 2], [None, None])], "t", "u")


def test_a_long_run_makes_no_heavy_chart() -> None:
    values = [math.sin(step) for step in range(20_000)]
    assert len(curve([Series("a", range(20_000), values)], "t", "u")) < 40_000


def test_noise_gets_a_running_mean_and_a_smooth_line_does_not() -> None:
    steps = range(60)
    assert lines(curve([Series("a", steps, [step % 2 for step in steps])], "t", "u")) == 2
    assert lines(curve([Series("a", steps, [step / 60 for step in steps])], "t", "u")) == 1


def test_two_charts_of_one_page_share_no_id() -> None:
    one, other = (curve([Series("a", [1, 2], [1, 2], [1, 1])], title, "u") for title in ("KL", "Reward"))

    def ids(svg: str) -> set[str]:
        return {node.attrib["id"] for node in parse(svg).iter() if "id" in node.attrib}

    assert ids(one)
    assert not ids(one) & ids(other)


def test_no_pyplot_and_no_leak_into_the_users_style() -> None:
    code = (
        "import sys, matplotlib; matplotlib.rcParams['font.size'] = 31\n"
        "from gemma_grpo.monitor.charts import *; curve([Series('a', [1, 2], [1, 2])], 't', 'u')\n"
        "assert matplotlib.rcParams['font.size'] == 31; assert 'matplotlib.pyplot' not in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_calibration_curve_shows_what_it_was_given() -> None:
    svg = calibration_curve([(0.1, 0.2, 10), (0.9, 0.8, 30), (math.nan, 0.5, 1)], "Calibration")
    assert {"predicted", "observed"} <= set(texts(svg))
    calibration_curve([], "Calibration")


def test_points_keep_their_kinds_names_and_what_is_fitted_to_them() -> None:
    kinds = [Series("reward", [0.0, 1.0, 2.0], [0.0, 0.5, 0.9]), Series("gold", [0.0, 1.0, 2.0], [0.0, None, 0.1])]
    svg = scatter(kinds, "Gain", "distance", "gain", lines=[Series("", [0.5, 1.0], [0.2, 0.4]), Series("", [], [])])
    assert "reward" in svg
    assert "gold" in svg
    whole = [kinds[0], Series("gold", [0.0, 1.0, 2.0], [0.0, 0.05, 0.1])]
    marks = [scatter(some, "Gain", "distance", "gain").count("<use") for some in (kinds, whole)]
    assert marks[1] == marks[0] + 1  # a mark for each point that has a value
    assert scatter(kinds, "Gain", "distance", "gain") == scatter(kinds, "Gain", "distance", "gain")


def test_marks_are_uprights_over_the_curve() -> None:
    plain, marked = (curve([Series("a", [0, 1, 2], [1.0, 2.0, 3.0])], "T", "u", marks=marks) for marks in ((), (1.0,)))
    assert marked.count('stroke-dasharray="1,2"') == plain.count('stroke-dasharray="1,2"') + 1


def test_no_drawing_has_a_style_that_a_strict_page_would_drop() -> None:
    svg = curve([Series("a", [1, 2, 3], [0.1, 0.3, 0.2], [0.1, 0.1, 0.1])], "t", "u", marks=[2], reference=0.2)
    assert "style" not in svg
    assert 'stroke="var(--chart-1' in svg
    assert 'fill-opacity="0.18"' in svg
    assert 'font-size="9px"' in svg


def test_hover_tells_where_the_numbers_lie() -> None:
    series = [Series('a"<b>', [0, 10], [1.0, 3.0]), Series("b", [0, 5, 10], [1.0, None, 2.0])]
    drawn = curve(series, "t", "u", hover=True)
    told = json.loads(html.unescape(re.search(r'data-hover="([^"]*)"', drawn)[1]))  # type: ignore[index]
    assert [line["label"] for line in told["lines"]] == ['a"<b>', "b"]
    assert told["lines"][1] == {"label": "b", "x": [0, 5, 10], "y": [1.0, None, 2.0]}
    left, top, right, bottom = told["box"]
    low_x, high_x, low_y, high_y = told["limits"]
    path = re.search(r'<path d="M ([\d.]+) ([\d.]+) L ([\d.]+) ([\d.]+)\s*"[^>]*stroke="var\(--chart-1', drawn)
    assert path is not None
    x0, y0, x1, y1 = map(float, path.groups())  # the first line's own ends, in the drawing's units

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - low_x) / (high_x - low_x) * (right - left), bottom - (y - low_y) / (high_y - low_y) * (bottom - top)

    assert place(0, 1.0) == pytest.approx((x0, y0), abs=0.05)
    assert place(10, 3.0) == pytest.approx((x1, y1), abs=0.05)

    assert "data-hover" not in curve(series, "t", "u")


@pytest.mark.filterwarnings("error")
def test_long_and_broken_names_leave_room_for_the_lines() -> None:
    drawn = curve([Series("a" * 300, [1, 2], [1.0, 2.0]), Series("run-\ud800" + "b" * 60 + "-7", [1, 2], [2.0, 1.0])], "t\ud800", "u")
    assert lines(drawn) == 2
    assert "aaaa…aaaa" in drawn
    assert "bbb-7" in drawn
