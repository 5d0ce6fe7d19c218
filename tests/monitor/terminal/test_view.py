"""Laws of what a trainer tells: plain lines without a terminal, and in one nothing that was said is lost or drawn over."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from gemma_grpo.monitor.terminal import ProgressView, Schedule
from gemma_grpo.types import Completion, Prompt, RolloutGroup, ScoredGroup, StepRecord

HOSTILE = "\x1b[2J\x1b]52;c;aGk=\x07\u202e[bold red]x[/bold red]\x9b31m"
ALARM = {"level": "alert", "step": 5, "witness": "witness", "text": "the reward rose from 0.1 to 0.9 while the judge went from 0.8 to 0.2"}


def record(step: int, reward: float = 0.5) -> StepRecord:
    seconds = {"rollout": 3.0, "reward": 0.5, "update": 1.5}
    return StepRecord(step, seconds, {"reward": reward, "reward_std": 0.25, "kl": 0.04, "entropy": 1.2, "loss": 7.0})


def hostile_group() -> ScoredGroup:
    prompt = Prompt("p", "s", ({"role": "user", "content": HOSTILE},), (2,), "c")
    completions = tuple(Completion(text, (1,), (0.0,), "stop") for text in ("poor " + HOSTILE, "fine " + HOSTILE, "unscored"))
    return ScoredGroup(RolloutGroup(prompt, completions, 0), (0.125, 0.875, None), {HOSTILE: (1.0, 2.0, None)}, (-1.0, 1.0, 0.0))


def looks(*alarms: dict[str, Any]) -> list[dict[str, Any]]:
    first = {"step": 0, "metrics": {"proxy": 0.1, "witness": 0.8, "strayed": 0.0}, "replies": [], "alarms": []}
    return [first, {"step": 5, "metrics": {"proxy": 0.9, "witness": 0.2, "strayed": 0.25}, "replies": [], "alarms": list(alarms)}]


def console(*, terminal: bool, encoding: str = "utf-8", width: int = 100, height: int = 40) -> tuple[Console, io.BytesIO]:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True, newline="")
    return Console(file=stream, force_terminal=terminal, width=width, height=height, color_system=None, markup=False, highlight=False), raw


def plain_lines(raw: io.BytesIO) -> list[str]:
    return raw.getvalue().decode("ascii").splitlines()


class Glass:
    """A terminal's glass and what scrolled off it: the few controls that redrawing takes, and a fault where a line is too long."""

    CONTROL = re.compile(r"\x1b\[(\??)(\d*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.lines, self.row = [""], 0

    def write(self, text: str) -> None:
        at = 0
        while at < len(text):
            found = self.CONTROL.match(text, at)
            assert found, f"a control that is not known: {text[at : at + 9]!r}"
            at = found.end()
            private, number, letter, back, feed, plain = found.groups()
            if plain:
                self.lines[self.row] += plain
                assert cell_len(self.lines[self.row]) <= self.width
            elif feed:
                self.row += 1
                self.lines += [""] if self.row == len(self.lines) else []
            elif letter == "A":
                self.row -= int(number or 1)
                assert self.row >= max(0, len(self.lines) - self.height), "moved above the glass"
            elif letter == "K":
                self.lines[self.row] = ""
            else:
                assert back or private or letter == "m"

    @property
    def visible(self) -> list[str]:
        return self.lines[-self.height :]


def glass(raw: io.BytesIO, width: int, height: int) -> Glass:
    shown = Glass(width, height)
    shown.write(raw.getvalue().decode())
    return shown


# ---- without a terminal


def test_without_a_terminal_each_step_is_one_ascii_line_reward_first_and_no_loss() -> None:
    screen, raw = console(terminal=False)
    with ProgressView(screen) as view:
        view.step(record(1), 61)
        view.step(record(2), 61, group=hostile_group())
    first, second = plain_lines(raw)
    assert first.startswith("step 1/61  reward 0.500  +- 0.250  kl 0.0400")
    assert "rollout 60%  reward 10%  update 30%" in first
    assert second.endswith("ETA 4:55")  # 59 steps of 5 s
    assert "loss" not in first + second


def test_the_time_left_on_a_line_says_what_is_in_it_beside_the_steps() -> None:
    screen, raw = console(terminal=False)
    with ProgressView(screen) as view:
        view.schedule(Schedule(look_every=5, save_every=0, evaluation_looks=10))
        view.took("look", 2.0, 0)
        view.step(record(1), 11)
    assert plain_lines(raw)[-1].endswith("ETA 1:16 with looks, evaluation")  # 10 x 5 s, looks at 5, 10 and 11 of 2 s, 20 s


def test_without_a_terminal_a_look_is_one_line_and_an_alarm_another() -> None:
    screen, raw = console(terminal=False)
    with ProgressView(screen) as view:
        view.look(looks()[:1])
        view.look(looks(ALARM))
    assert plain_lines(raw) == [
        "look at step 0  reward 0.100  held-out judge 0.800  strayed 0%",
        "look at step 5  reward 0.900 (+0.800)  held-out judge 0.200 (-0.600)  strayed 25% (+25)",
        f"alert at step 5: {ALARM['text']}",
    ]


def test_notes_warnings_and_phases_are_lines_of_plain_text() -> None:
    screen, raw = console(terminal=False)
    with ProgressView(screen) as view:
        view.phase("policy", "60 steps")
        view.note("[bold]é[/bold]")
        view.warn("\x1b[2Jgone")
    assert plain_lines(raw) == ["policy: 60 steps", "note: [bold]\\xe9[/bold]", "warning: \\x1b[2Jgone"]


def test_the_training_of_each_judge_prints_about_twenty_lines_however_long() -> None:
    screen, raw = console(terminal=False)
    with ProgressView(screen) as view:
        for adapter in ("reward", "witness"):
            for update in range(1, 1001):
                view.reward_training(update, 1000, 0.6, 0.7, adapter=adapter)
    lines = plain_lines(raw)
    assert 38 <= len(lines) <= 44
    assert lines[-1].startswith("witness adapter 1000/1000  pair accuracy 70.0%")
    assert sum(line.startswith("reward adapter") for line in lines) == len(lines) / 2


def test_a_judge_that_goes_on_in_the_middle_has_a_pace_of_its_own() -> None:
    screen, raw = console(terminal=False)
    with ProgressView(screen) as view:
        view.reward_training(1, 9, 0.6, 0.7)
        view.reward_training(5, 9, 0.6, 0.7, adapter="witness")
    assert "ETA" not in plain_lines(raw)[-1]  # one update says nothing of how long another takes


def test_without_a_terminal_a_table_is_lines_aligned_by_spaces() -> None:
    screen, raw = console(terminal=False, width=20)
    ProgressView(screen).table("What took long", [("phase", "seconds", "share"), ("rollout", "12.5", "50.0%"), ("a\x1b[2J", "1", "")])
    assert plain_lines(raw) == [
        "What took long",
        "phase     seconds  share",
        "rollout      12.5  50.0%",
        "a\\x1b[2J        1",
    ]


# ---- in a terminal


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "cp1252", "ascii"])
def test_a_terminal_of_any_encoding_shows_the_group_and_obeys_nothing_in_it(encoding: str) -> None:
    screen, raw = console(terminal=True, encoding=encoding, width=160)
    with ProgressView(screen) as view:
        view.phase("policy")
        view.step(record(1), 10, group=hostile_group())
        view.look(looks(ALARM | {"text": HOSTILE}))
        view.table("title " + HOSTILE, [("name", "value"), (HOSTILE, "1")])
        view.warn(HOSTILE)
    shown = raw.getvalue().decode(encoding)
    assert "best  0.88 fine \\x1b[2J\\x1b]52;c;aGk=\\x07\\u202e[bold red]x[/bold red]\\x9b31m" in shown
    assert "worst 0.12 poor" in shown
    assert not {"\x07", "\u202e", "\x9b", "\x1b]"} & set(shown)
    assert "\x1b[2J" not in shown
    assert encoding == "utf-8" or shown.isascii()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (40, 10), (30, 5)])
def test_whatever_was_said_is_on_the_glass_or_above_it_once_and_the_last_picture_below(width: int, height: int) -> None:
    screen, raw = console(terminal=True, width=width, height=height)
    with ProgressView(screen) as view:
        view.phase("training", "many steps")
        for step in range(1, 30):
            view.step(record(step), 29, group=hostile_group())
            if step % 3 == 0:
                view.warn(f"<<{step}>>")
            if step % 10 == 0:
                view.look(looks(ALARM | {"text": f"[[{step}]]"}))
            print(f"from elsewhere {step}")  # as libraries do
    shown = glass(raw, width, height)
    everything = "\n".join(shown.lines)
    for step in range(3, 30, 3):
        assert everything.count(f"warning: <<{step}>>") == 1
    for step in range(10, 30, 10):
        assert everything.count(f"alert at step 5: [[{step}]]") >= 1
    assert len([line for line in shown.lines if line.startswith(" reward ")]) == 1  # no remains of earlier pictures
    assert any(line.startswith(" reward ") for line in shown.visible)
    assert height < 6 or any(line.startswith(" alarms ") for line in shown.visible)


def test_the_last_thing_said_is_still_seen_beside_the_picture() -> None:
    screen, raw = console(terminal=True, width=80, height=12)
    with ProgressView(screen) as view:
        for step in range(1, 9):
            view.step(record(step), 9, group=hostile_group())
            view.look(looks())
        view.warn("the last thing")
        seen = glass(raw, 80, 12).visible
    assert "warning: the last thing" in seen


def test_the_profile_is_shown_below_the_last_picture() -> None:
    screen, raw = console(terminal=True, width=80)
    profile = {"phases": {"rollout": {"seconds": 12.5, "share": 1.0}}, "device": HOSTILE, "advice": HOSTILE}
    with ProgressView(screen) as view:
        view.phase("training")
        view.step(record(1), 1)
        view.profile(profile)
    shown = raw.getvalue().decode()
    assert shown.rindex("step 1/1") < shown.rindex("\x1b[?25h") < shown.index("beside what this machine could do") < shown.index("12.5")
    assert not {"\x07", "\u202e", "\x9b"} & set(shown)


def test_the_view_closes_when_the_run_fails_and_leaves_the_error_alone() -> None:
    screen, raw = console(terminal=True)
    view = ProgressView(screen)

    def run() -> None:
        with view:
            view.step(record(1), 10)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    after = len(raw.getvalue())
    view.close()
    assert len(raw.getvalue()) == after
    assert any("step 1/10" in line for line in glass(raw, 100, 40).visible)


def test_a_run_that_goes_on_shows_what_it_did_before() -> None:
    screen, raw = console(terminal=True)
    with ProgressView(screen) as view:
        view.earlier([{"step": step, "reward": 0.25 * step} for step in (1, 2, 3)], looks(ALARM))
        view.step(record(4, reward=1.0), 8)
    rows = glass(raw, 100, 40).visible
    assert any("first 0.250 (+0.750)" in row for row in rows)
    assert any("alert at step 5" in row for row in rows)


def test_what_begins_while_no_run_is_shown_is_a_line() -> None:
    screen, raw = console(terminal=True)
    ProgressView(screen).phase("evaluation", "8 prompts")
    assert raw.getvalue().decode() == "evaluation: 8 prompts\n"
