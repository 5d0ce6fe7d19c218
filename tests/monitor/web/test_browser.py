"""The page in a real browser, while a run is written: every view, a reload, a server that starts again, a log that is cut, hostile text."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyRun
from hostile_texts import PAYLOADS
from page_server import TOKEN
from written_runs import RECIPE, group, look, write_run, write_step

from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.types import StepRecord

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is on this machine (Debian: apt-get install chromium)")


class Watched:
    """`gemma-grpo watch` as its own process, on one port, with one token."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.token_file = root, folder / "token"
        self.token_file.write_text(TOKEN, encoding="utf-8")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        words = ["watch", str(self.root), "--port", str(self.port), "--token-file", str(self.token_file)]
        self.process = subprocess.Popen([sys.executable, "-m", "gemma_grpo.cli", *words], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.link = self.process.stdout.readline().removeprefix("page: ").strip()
        while True:
            with socket.socket() as talk:
                if talk.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "one", 12)
    write_run(root / "two", 5, seed=1, evaluated=False)
    return root


@pytest.fixture(scope="module")
def watched(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    found = Watched(root, tmp_path_factory.mktemp("token"))
    yield found
    found.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Tab:
    """A page of the browser, and all that went wrong in it."""

    def __init__(self, browser: Any, watched: Watched, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.port, self.wrong, self.foreign = watched.port, [], []
        self.page.on("console", lambda message: self.wrong.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on(
            "request", lambda asked: None if asked.url.startswith(f"http://127.0.0.1:{watched.port}/") else self.foreign.append(asked.url)
        )
        self.page.goto(watched.link)

    def show(self, place: str) -> Any:
        self.page.goto(f"http://127.0.0.1:{self.port}/#/{place}")
        return self.page

    def close(self, *, but: str = "nothing is let pass") -> None:
        """Nothing went wrong but what is of no account, and nothing was asked of another machine."""
        self.context.close()
        assert not [text for text in self.wrong if not re.search(but, text)]
        assert not self.foreign


@pytest.fixture
def tab(browser: Any, watched: Watched) -> Iterator[Tab]:
    found = Tab(browser, watched)
    yield found
    found.close()


def wait_for(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)


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


@pytest.fixture(scope="module")
def trained(train_tiny: Callable[..., TinyRun], pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """The page of a run with a model."""
    run = train_tiny(
        dataset=str(pairs_file), reward={"length": 1.0}, max_completion_length=8, **{"witness.num_prompts": 2, "witness.every": 1}
    )
    found = Watched(run.path, tmp_path_factory.mktemp("token"))
    yield found
    found.stop()


def test_both_sides_answer_and_a_blind_vote_is_counted(browser: Any, trained: Watched) -> None:
    tab = Tab(browser, trained)
    page = tab.show(f"run/{trained.root.name}/playground")
    page.get_by_label("held-out prompt").select_option("0")
    assert page.get_by_label("question").input_value()
    page.get_by_role("button", name="answer").click()
    page.get_by_text("Shaded: tokens").wait_for(timeout=60_000)
    assert [one.split(" · ")[0] for one in page.locator(".answer .facts:first-child").all_inner_texts()] == [
        "base (adapter off)",
        "tuned (adapter on)",
    ]
    assert page.locator(".answer [title$=nat]").count() >= 2
    assert "reward" in page.locator(".answer").nth(1).inner_text()

    page.get_by_label("blind").check()
    page.get_by_role("button", name="answer").click()
    page.get_by_text("Which is better?").wait_for()
    assert not re.search("base|tuned|reward", page.locator(".two").inner_text())
    page.get_by_role("button", name="the second").click()
    page.get_by_text("Counted. The first was").wait_for()
    assert {one.split(" (")[0] for one in page.locator(".answer .facts:first-child").all_inner_texts()} == {"base", "tuned"}
    tab.show(f"run/{trained.root.name}/report")
    page.frame_locator("iframe").get_by_text("People who did not know which was which").wait_for()
    tab.close()


def test_a_run_is_followed_while_it_is_written(browser: Any, root: Path, watched: Watched) -> None:
    """Its curve grows, its groups follow, a reload loses nothing, the server may start again, and a resume cuts the log."""
    tab = Tab(browser, watched)
    with RunDirectory.create(root / "live", RECIPE.format(seed=0), {"status": "running", "started": time.time(), "total_steps": 40}) as run:
        run.append_look(look(0))
        write_step(run, 1)
        page = tab.show("run/live/curves")
        first = page.locator("figure", has=page.get_by_role("heading", name="Reward", exact=True))
        first.locator("svg").wait_for()
        page.locator("#connection", has_text="live").wait_for()

        def last_step() -> str:
            first.focus()
            page.keyboard.press("End")
            return str(first.locator(".readout").inner_text())

        offsets = {}
        for step in range(2, 8):
            write_step(run, step)
            offsets[step] = run.offsets()
        wait_for(lambda: "step 7 of 40" in page.content() and last_step() == "step 7: 0.7000 reward")

        run.append_look(look(7, alarm=True))
        page.locator(".notice.alarm").wait_for()  # an alarm is on the page when it happens

        page.reload()
        first.locator("svg").wait_for()
        assert page.url.endswith("#/run/live/curves")

        tab.show("run/live/groups")
        page.get_by_text("step 7 of 1 to 7").wait_for()
        write_step(run, 8)
        page.get_by_text("step 8 of 1 to 8").wait_for()

        watched.stop()
        page.get_by_text("connecting again").or_(page.get_by_text("does not answer")).wait_for()
        watched.start()
        write_step(run, 9)
        page.get_by_text("step 9 of 1 to 9").wait_for(timeout=20_000)

        run.truncate(offsets[5])  # a resume from the checkpoint of step 5
        page.get_by_text("step 5 of 1 to 5").wait_for(timeout=20_000)
        write_step(run, 6)
        page.get_by_text("step 6 of 1 to 6").wait_for(timeout=20_000)
        run.ended(6)
        page.locator(".badge.finished").wait_for(timeout=20_000)
    tab.wrong = [
        text for text in tab.wrong if "ERR_CONNECTION" not in text and "ERR_INCOMPLETE" not in text
    ]  # of the server that was stopped
    tab.close()


def test_whoever_has_an_old_token_is_told(browser: Any, watched: Watched) -> None:
    tab = Tab(browser, watched)
    tab.context.clear_cookies()
    page = tab.show("run/one/curves")
    page.reload()
    assert "with its token" in page.content()
    tab.close(but="403")


def test_hostile_text_stays_text(browser: Any, root: Path, watched: Watched) -> None:
    assert len(PAYLOADS) >= 100
    info = {"status": "failed", "error": PAYLOADS[0], "model": PAYLOADS[1], "dataset": PAYLOADS[2], "versions": {PAYLOADS[3]: PAYLOADS[4]}}
    with RunDirectory.create(root / "hostile", RECIPE.format(seed=0) + f"# {PAYLOADS[5]}\n", {**info, "data": {PAYLOADS[6]: 1}}) as run:
        for step, payload in enumerate(PAYLOADS, start=1):
            run.append_metrics(
                StepRecord(step, {payload: 1.0}, {"reward": 1.0, f"rewards/{payload[:200]}/mean": 1.0, "rewards/b/mean": 1.0})
            )
            run.append_samples(step, [group(step, payload, source=payload)])
            run.event("warn", text=payload)
        for step in (0, 1):
            run.append_look(
                {**look(step, PAYLOADS[step]), "alarms": [{"level": "alert", "step": step, "witness": PAYLOADS[7], "text": PAYLOADS[8]}]}
            )
        run.write_json(
            "evaluation.json", {"gold": {"before": 0.1, "after": 0.2, "gain": 0.1, "interval": [0, 1], "n": 2, "judge": PAYLOADS[9]}}
        )
    tab = Tab(browser, watched)
    page = tab.page
    page.evaluate("document.addEventListener('securitypolicyviolation', (event) => { window.__hit = event.violatedDirective; })")
    shown = ""
    for place in ("run/hostile/curves", "run/hostile/replies", "run/hostile/evaluation", "run/hostile/settings", "compare/hostile/one", ""):
        tab.show(place)
        page.wait_for_timeout(1500 if "curves" in place or "compare" in place else 500)
        while page.get_by_role("button", name="more").is_visible():
            page.get_by_role("button", name="more").click()
            page.wait_for_timeout(150)
        shown += page.locator("body").inner_text()
        assert page.evaluate("window.__hit") is None, place
        assert page.locator("main").locator("script, iframe, img, object, style, link, form, [onerror], [onload]").count() == 0, place
    tab.show("run/hostile/report")
    page.frame_locator("iframe").get_by_role("heading", name="hostile", exact=True).wait_for()
    assert page.evaluate("window.__hit") is None
    for payload in PAYLOADS:
        if re.fullmatch(r"[ -~]+", payload):
            assert payload in shown, payload
    assert not [one for one in shown if one in "\u202e\u2066\u200b\x00\x1b\ufeff"]  # written out, not obeyed
    tab.close()


VIEWS = [
    "",
    "run/one/curves",
    "run/one/groups",
    "run/one/replies",
    "run/one/evaluation",
    "run/one/settings",
    "run/one/report",
    "compare/one/two",
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
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
