"""Every view of the page in a real browser: what it shows, by pointer, keys and finger, and that it is accessible."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from browsing import Tab, Watched, needs_chromium
from written_runs import RECIPE, group

from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.monitor.web.groups import SCANNED
from gemma_grpo.types import StepRecord

pytestmark = needs_chromium


def test_on_a_phone_a_tap_reads_a_value_and_the_tabs_are_in_sight(browser: Any, watched: Watched) -> None:
    tab = Tab(browser, watched, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = tab.show("run/one/curves")
    chart = page.locator("figure", has=page.get_by_role("heading", name="Reward", exact=True))
    chart.locator("svg").wait_for()
    assert page.locator("nav.tabs").bounding_box()["y"] < 844 / 2
    chart.locator("svg").scroll_into_view_if_needed()
    chart.locator("svg").tap()
    assert re.match(r"step [67]: 0\.[67]000 reward", chart.locator(".readout").inner_text())
    tab.close()


def test_the_token_leaves_the_address_and_the_list_leads_to_a_run(tab: Tab) -> None:
    page = tab.page
    page.get_by_role("link", name="one").click()
    page.get_by_role("heading", level=1, name="one").wait_for()
    assert "token" not in page.url
    assert page.url.endswith("#/run/one/curves")
    page.locator("figure svg").first.wait_for()
    assert page.locator(".notice.alarm h2").inner_text() == "One alarm"
    assert "gain 0.20" in page.locator(".verdict").inner_text()


def test_values_are_read_off_a_curve_by_pointer_and_by_keys(tab: Tab) -> None:
    page = tab.show("run/one/curves")
    figure = page.locator("figure").first
    figure.locator("svg").wait_for()
    figure.scroll_into_view_if_needed()
    box = figure.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 12, box["y"] + box["height"] / 2)
    assert figure.locator(".readout").inner_text() == "step 12: 1.2000 reward"
    page.mouse.move(0, 0)
    figure.focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    assert figure.locator(".readout").inner_text() == "step 10: 1 reward"
    page.keyboard.press("Home")
    assert figure.locator(".readout").inner_text() == "step 1: 0.1000 reward"


def test_groups_are_walked_and_flat_ones_named(tab: Tab) -> None:
    page = tab.show("run/one/groups")
    page.locator("article.group").first.wait_for()
    assert page.locator("article.group").count() == 3
    assert page.locator(".answer.best .facts").first.inner_text().startswith("best · reward 0.750 · advantage 1")
    assert "all rewards are equal" in page.locator("article.group").nth(1).inner_text()
    page.get_by_role("button", name="earlier").click()
    page.get_by_text("step 11 of 1 to 12").wait_for()
    page.get_by_role("button", name="first").click()
    page.get_by_text("step 1 of 1 to 12").wait_for()
    assert page.get_by_role("button", name="earlier").is_disabled()
    page.get_by_label("step", exact=True).fill("7")
    page.keyboard.press("Enter")
    page.get_by_text("step 7 of 1 to 12").wait_for()


def test_replies_are_filtered_and_ranked(tab: Tab) -> None:
    page = tab.show("run/one/replies")
    page.locator("article.group").nth(11).wait_for()
    page.get_by_label("which replies").select_option("filter:zero variance")
    page.get_by_text("12 groups; looked through").wait_for()
    assert page.locator("article.group").count() == page.get_by_text("all rewards are equal").count() == 12
    page.get_by_label("which replies").select_option("filter:all")
    page.get_by_label("source").select_option("harmless")
    page.get_by_text("12 groups; looked through").wait_for()
    page.get_by_label("which replies").select_option("order:most suspicious")
    page.get_by_text("2 replies of the look at step 12").wait_for()
    assert "h1" in page.locator("article.group").first.inner_text()


def test_a_rare_group_is_found_in_a_long_log_without_asking_on(root: Path, tab: Tab) -> None:
    with RunDirectory.create(root / "long", RECIPE.format(seed=0), {"status": "running", "started": time.time()}) as run:
        for step in range(1, 102):
            groups = [group(step, "word " * 20_000)] if step != 3 else [group(step, flat=True)]
            run.append_step(StepRecord(step, {}, {"reward": 0.5}), groups)
        assert (run.path / "samples.jsonl").stat().st_size > 5 * SCANNED
        run.ended(101)
    page = tab.show("run/long/replies")
    page.locator("article.group").nth(11).wait_for()
    page.get_by_label("which replies").select_option("filter:zero variance")
    page.get_by_text("1 groups; looked through steps 1 to 101, which is all").wait_for()
    assert page.locator("article.group").count() == 1
    assert "step 3 " in page.locator("article.group").inner_text()


def test_two_runs_are_compared(tab: Tab) -> None:
    page = tab.show("")
    page.get_by_label("compare one").check()
    page.get_by_label("compare two").check()
    page.get_by_role("button", name="compare 2").click()
    page.get_by_role("row", name="seed 0 1").wait_for()
    page.locator("figure svg").first.wait_for()
    words = page.locator("figure svg").first.text_content()
    assert "one" in words
    assert "two" in words


def test_settings_evaluation_and_report_are_in_place(tab: Tab) -> None:
    page = tab.show("run/one/settings")
    page.get_by_text("model_name: miniature").wait_for()
    tab.show("run/one/evaluation")
    page.get_by_role("row", name="gold 0.70").wait_for()
    tab.show("run/one/report")
    page.frame_locator("iframe").get_by_role("heading", name="one", exact=True).wait_for()


VIEWS = [
    "",
    "run/one/curves",
    "run/one/groups",
    "run/one/replies",
    "run/one/playground",
    "run/one/evaluation",
    "run/one/settings",
    "run/one/report",
    "compare/one/two",
]


@pytest.mark.parametrize(
    ("width", "scheme"),
    [(1440, "light"), (390, "dark"), *(pytest.param(*look, marks=pytest.mark.slow) for look in ((1440, "dark"), (390, "light")))],
)
def test_every_view_is_accessible_and_fits(browser: Any, watched: Watched, width: int, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed").Axe()
    tab = Tab(browser, watched, viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce")
    for view in VIEWS:
        page = tab.show(view)
        page.locator("h1").wait_for()
        page.wait_for_timeout(600)
        found = axe.run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"]}).response["violations"]
        serious = [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found if one["impact"] in ("serious", "critical")]
        assert not serious, (view, serious)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
    tab.close(but="postMessage")  # axe's own, to the report's frame, which takes no script


def test_every_view_is_reached_by_keys_alone(tab: Tab) -> None:
    page = tab.page
    page.get_by_role("heading", name="Runs").wait_for()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "one":
            break
    page.keyboard.press("Enter")
    page.get_by_role("heading", level=1, name="one").wait_for()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "tab-groups":
            break
    page.keyboard.press("Enter")
    page.locator("article.group").first.wait_for()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_nothing_of_the_script_makes_markup_of_text() -> None:
    folder = Path(__file__).parents[3] / "gemma_grpo" / "monitor" / "web" / "static"
    scripts = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.suffix in (".js", ".html")}
    assert len(scripts) >= 5
    for name, text in scripts.items():
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|DOMParser|javascript:", text
        ), name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name
