"""The page in a real browser while a run is written: reload, a server that starts again, a log that is cut; playground; hostile text."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import Tab, Watched, needs_chromium, wait_for
from conftest import TinyRun
from hostile_texts import PAYLOADS
from written_runs import RECIPE, group, look, write_step

from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.types import StepRecord

pytestmark = needs_chromium


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
