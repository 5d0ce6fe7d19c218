"""Laws of the terminal view: plain lines without a terminal, reward before loss, nothing a model writes is obeyed."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from gemma_grpo.monitor.terminal import ProgressView, bar, clock, sparkline
from gemma_grpo.types import Completion, Prompt, RolloutGroup, ScoredGroup, StepRecord

HOSTILE = "\x1b[2J\x1b]52;c;aGk=\x07\u202e[bold red]x[/bold red]\x9b31m"


def record(step: int, reward: float = 0.5) -> StepRecord:
    seconds = {"rollout": 3.0, "reward": 0.5, "update": 1.5}
    return StepRecord(step, seconds, {"reward": reward, "reward_std": 0.25, "kl": 0.04, "entropy": 1.2, "loss": 7.0})


def hostile_group() -> ScoredGroup:
    prompt = Prompt("p", "s", ({"role": "user", "content": HOSTILE},), (2,), "c")
    completions = tuple(Completion(text, (1,), (0.0,), "stop") for text in ("poor " + HOSTILE, "fine " + HOSTILE, "unscored"))
    return ScoredGroup(RolloutGroup(prompt, completions, 0), (0.125, 0.875, None), {}, (-1.0, 1.0, 0.0))


def console(*, terminal: bool, encoding: str = "utf-8", width: int = 100) -> tuple[Console, io.BytesIO]:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    return Console(file=stream, force_terminal=terminal, width=width, height=40, color_system=None, markup=False), raw


def plain_lines(raw: io.BytesIO) -> list[str]:
    return raw.getvalue().decode("ascii").splitlines()


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


def test_the_first_step_which_warms_up_does_not_count_for_the_eta() -> None:
    screen, raw = console(terminal=False)
    with ProgressView(screen) as view:
        view.step(StepRecord(1, {"rollout": 100.0}, {}), 12)
        view.step(StepRecord(2, {"rollout": 2.0}, {}), 12)
    assert plain_lines(raw)[-1].endswith("ETA 0:20")


def test_notes_warnings_and_phases_are_lines_of_plain_text() -> None:
    screen, raw = console(terminal=False)
    with ProgressView(screen) as view:
        view.phase("policy", "60 steps")
        view.note("[bold]é[/bold]")
        view.warn("\x1b[2Jgone")
    assert plain_lines(raw) == ["policy: 60 steps", "note: [bold]\\xe9[/bold]", "warning: \\x1b[2Jgone"]


def test_reward_training_prints_about_twenty_lines_however_long() -> None:
    screen, raw = console(terminal=False)
    with ProgressView(screen) as view:
        for update in range(1, 1001):
            view.reward_training(update, 1000, 0.6, 0.7)
    lines = plain_lines(raw)
    assert 19 <= len(lines) <= 22
    assert lines[-1].startswith("reward adapter 1000/1000  pair accuracy 70.0%")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "cp1252", "ascii"])
def test_a_terminal_of_any_encoding_shows_the_group_and_obeys_nothing_in_it(encoding: str) -> None:
    screen, raw = console(terminal=True, encoding=encoding)
    with ProgressView(screen) as view:
        view.phase("policy")
        view.step(record(1), 10, group=hostile_group())
        view.table("title " + HOSTILE, [("name", "value"), (HOSTILE, "1")])
        view.warn(HOSTILE)
    shown = raw.getvalue().decode(encoding)
    assert "best      0.875  fine \\x1b[2J\\x1b]52;c;aGk=\\x07\\u202e[bold red]x[/bold red]\\x9b31m" in shown
    assert "worst     0.125  poor" in shown
    assert not {"\x07", "\u202e", "\x9b", "\x1b]"} & set(shown)
    assert "\x1b[2J" not in shown
    assert shown.index("reward") < shown.index("details") < shown.index("loss 7")


def test_without_a_terminal_a_table_is_lines_aligned_by_spaces() -> None:
    screen, raw = console(terminal=False, width=20)
    ProgressView(screen).table("What took long", [("phase", "seconds", "share"), ("rollout", "12.5", "50.0%"), ("a\x1b[2J", "1", "")])
    assert plain_lines(raw) == [
        "What took long",
        "phase     seconds  share",
        "rollout      12.5  50.0%",
        "a\\x1b[2J        1",
    ]


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


def test_a_group_without_a_single_score_is_left_out() -> None:
    screen, raw = console(terminal=True)
    group = hostile_group()
    unscored = ScoredGroup(group.group, (None, None, None), {}, group.advantages)
    with ProgressView(screen) as view:
        view.step(record(1), 10, group=unscored)
    assert "best" not in raw.getvalue().decode()


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


def test_sparkline_scales_between_the_extremes_and_averages_what_does_not_fit() -> None:
    assert sparkline([0, 7, 2], 8, ascii_only=True) == "_#-"
    assert sparkline([0, 0, 1, 1], 2) == "▁█"
    assert sparkline([2, 2], 8) == "▁▁"
    assert sparkline([], 8) == ""


def test_clock_and_bar() -> None:
    assert [clock(s) for s in (0, 22, 725, 11045, 183600)] == ["0:00", "0:22", "12:05", "3:04:05", "2d 3h"]
    assert [bar(share, 4, ascii_only=True) for share in (-1, 0.5, 2)] == ["----", "##--", "####"]
