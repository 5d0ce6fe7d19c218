"""Laws of the notebook's output: there is one, it has everything that was said, its text is escaped, and it is not sent too often."""

from __future__ import annotations

import re
import sys
import time

from gemma_grpo.monitor.terminal.notebook import Notebook, publisher
from gemma_grpo.monitor.terminal.seen import Seen
from gemma_grpo.types import StepRecord

HOSTILE = "<script>alert(1)</script> & \x1b[2J\u202e</pre>"


class Page:
    """A front end: outputs by name, each replaced by its updates."""

    def __init__(self) -> None:
        self.outputs: dict[str, dict[str, str]] = {}
        self.times: list[float] = []

    def publish(self, data: dict[str, str], name: str, update: bool) -> None:
        assert (name in self.outputs) == update
        self.outputs[name] = data
        self.times.append(time.monotonic())

    @property
    def output(self) -> dict[str, str]:
        (only,) = self.outputs.values()
        return only


def test_a_run_has_one_output_with_all_that_was_said_and_the_last_picture() -> None:
    page, seen = Page(), Seen()
    view = Notebook(page.publish, seen, every=60.0)
    view.start()
    for step in range(1, 9):
        seen.step(StepRecord(step, {"rollout": 1.0}, {"reward": 0.1 * step}), 8, None)
        view.step()
        view.say("warning: ", f"<<{step}>>", "yellow")
    view.table("a table", [("phase", "seconds"), ("rollout", "8")])
    seen.step(StepRecord(9, {"rollout": 1.0}, {"reward": 0.9}), 9, None)
    view.step()
    view.stop()
    for step in range(1, 9):
        assert page.output["text/plain"].count(f"warning: <<{step}>>") == 1
    assert "rollout        8" in page.output["text/plain"]
    assert "step 9/9" in page.output["text/plain"]
    assert page.output["text/plain"].index("<<8>>") < page.output["text/plain"].index("step 9/9")


def test_no_text_is_markup_or_obeyed() -> None:
    page, seen = Page(), Seen()
    view = Notebook(page.publish, seen)
    view.start()
    seen.begin(HOSTILE)
    view.say("warning: ", HOSTILE, "yellow")
    view.table(HOSTILE, [(HOSTILE,)])
    view.stop()
    tags = set(re.findall(r"<(/?\w+)", page.output["text/html"]))
    assert tags == {"pre", "/pre", "span", "/span"}
    assert not {"\x1b", "\u202e"} & set("".join(page.output.values()))
    assert "&lt;script&gt;" in page.output["text/html"]


def test_steps_are_sent_no_more_often_than_asked_and_what_was_held_back_comes_by_itself() -> None:
    page, seen = Page(), Seen()
    view = Notebook(page.publish, seen, every=0.2)
    view.start()
    for step in range(1, 101):
        seen.step(StepRecord(step, {"rollout": 1.0}, {"reward": 0.1}), 100, None)
        view.step()
    deadline = time.monotonic() + 10
    while "step 100/100" not in page.output["text/plain"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "step 100/100" in page.output["text/plain"]
    assert len(page.times) <= 1 + (time.monotonic() - page.times[0]) / 0.2
    view.stop()


def test_very_many_warnings_are_counted_where_they_are_no_longer_held() -> None:
    page = Page()
    view = Notebook(page.publish, Seen(), every=60.0)
    view.start()
    for n in range(230):
        view.say("warning: ", f"<<{n}>>", "yellow")
    view.stop()
    lines = page.output["text/plain"].splitlines()
    assert lines[0] == "30 earlier ones are in events.jsonl"
    assert lines[1] == "warning: <<30>>"


def test_a_second_run_has_an_output_of_its_own_and_what_is_said_between_them_too() -> None:
    page, seen = Page(), Seen()
    view = Notebook(page.publish, seen, every=60.0)
    view.start()
    view.stop()
    view.stop()
    view.say("note: ", "between", "cyan")
    seen.begin("evaluation")
    view.phase()
    view.start()
    view.stop()
    assert [output["text/plain"] for output in page.outputs.values()][1:3] == ["note: between", "evaluation"]
    assert len(page.outputs) == 4


def test_outside_of_a_notebook_there_is_nobody_to_publish_to_and_ipython_is_not_imported() -> None:
    loaded = "IPython" in sys.modules
    assert publisher() is None
    assert ("IPython" in sys.modules) == loaded
