"""Laws of the picture: it fits every size, the reward and the alarms go last, and nothing in it is obeyed or beyond the encoding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from rich.cells import cell_len

from gemma_grpo.monitor.terminal.pace import Schedule
from gemma_grpo.monitor.terminal.picture import SIDE_BY_SIDE, Row, picture
from gemma_grpo.monitor.terminal.seen import JudgeTraining, Seen
from gemma_grpo.types import Completion, Prompt, RolloutGroup, ScoredGroup, StepRecord

HOSTILE = "\x1b[2J\x1b]52;c;aGk=\x07\u202e[bold red]x[/bold red]\x9b31m\nnext\tline é 漢字漢字漢字 👍 e\u0301 " + "word " * 80
SIZES = [(width, height) for width in (1, 7, 20, 40, 79, 80, 100, 129, 130, 200, 320) for height in (1, 2, 3, 6, 12, 20, 46, 80)]
TEXT = "since step 0 the reward rose from 0.443 to 0.621 on held-out prompts while the held-out judge went from 0.859 to 0.401"


def alarm(step: int = 10, level: str = "alert", text: str = TEXT) -> dict[str, Any]:
    return {"level": level, "step": step, "witness": "witness", "text": text, "samples": ["p1"]}


def look(step: int, *alarms: dict[str, Any], **metrics: float) -> dict[str, Any]:
    return {"step": step, "metrics": metrics, "replies": [], "alarms": list(alarms)}


def group(text: str) -> ScoredGroup:
    prompt = Prompt("p", "s", ({"role": "user", "content": text},), (2,), "c")
    completions = tuple(Completion(f"{kind} {text}", (1,), (0.0,), "stop") for kind in ("poor", "fine", "unscored"))
    parts = {"judge": (-1.5, 2.25, None), "overlong": (0.0, -0.5, None), "empty": (0.0, 0.0, None), text[:9]: (0.0, 1.0, None)}
    return ScoredGroup(RolloutGroup(prompt, completions, 0), (0.125, 0.875, None), parts, (-1.0, 1.0, 0.0))


def record(step: int, **metrics: float) -> StepRecord:
    known = {"reward": 0.1 * step, "reward_std": 0.25, "kl": 0.04, "entropy": 1.2, "loss": 7.0, "completions/mean_length": 15.0}
    known |= {"completions/clipped_ratio": 0.03, "grad_norm": 1.0, "rewards/judge/mean": 0.5, "rewards/empty/mean": 0.0}
    return StepRecord(step, {"rollout": 3.0, "reward": 0.5, "update": 1.5}, known | metrics)


def full(text: str = HOSTILE) -> Seen:
    """A run that has told everything there is, with this text wherever it can be."""
    seen = Seen()
    seen.begin(f"training: {text}")
    seen.pace.schedule = Schedule(5, 4, 10)
    seen.pace.took("look", 2.0, 0)
    for step in range(1, 8):
        seen.step(record(step), 12, group(text))
        seen.warn(f"warned {text}")
    first = look(0, proxy=0.443, witness=0.859, gold=0.3, strayed=0.0, kl_sequence=0.0, refusal_harmful=0.5)
    alarms = [alarm(5, "warn", text), alarm(text=TEXT)]
    seen.look([first, look(10, *alarms, proxy=0.621, witness=0.401, gold=0.35, strayed=0.04, kl_sequence=1.2, refusal_harmful=0.9)])
    return seen


def shown(seen: Seen, width: int = 100, height: int = 40, ascii_only: bool = False) -> list[str]:
    return texts(picture(seen, width, height, ascii_only=ascii_only, now=seen.phase_started + 72))


def texts(rows: Iterable[Row]) -> list[str]:
    return [row.text for row in rows]


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_no_row_is_wider_and_no_picture_higher_than_the_screen(width: int, height: int, ascii_only: bool) -> None:
    training = Seen()
    training.begin(HOSTILE)
    training.training = JudgeTraining("witness", 3, 7, 0.5, 0.7, 12.0)
    for seen in (full(), training, Seen()):
        rows = shown(seen, width, height, ascii_only)
        assert len(rows) <= height
        assert max(map(cell_len, rows), default=0) <= width


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_where_only_ascii_can_be_shown_there_is_nothing_else(width: int, height: int) -> None:
    assert "".join(shown(full(), width, height, ascii_only=True)).isascii()


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_nothing_in_it_is_obeyed(width: int, height: int) -> None:
    assert all(row.isprintable() for row in shown(full(), width, height))


@pytest.mark.parametrize("width", [20, 80, 200])
def test_the_reward_and_the_alarms_are_the_last_to_be_left_out(width: int) -> None:
    assert shown(full(), width, 1)[0].lstrip().startswith("reward")
    reward, alarms = shown(full(), width, 2)
    assert reward.lstrip().startswith("reward")
    assert alarms.lstrip().startswith("alarms")
    for height in range(3, 60):
        labels = [row.split()[0] for row in shown(full(), width, height) if row.strip()]
        assert {"reward", "alarms"} <= set(labels)


@pytest.mark.parametrize("width", [80, 200])
def test_the_details_are_the_first_to_be_left_out(width: int) -> None:
    seen = full("hi")
    heights = {
        label: min(h for h in range(1, 80) if any(label in row for row in shown(seen, width, h))) for label in ("loss 7", "nat/token")
    }
    assert heights["loss 7"] > heights["nat/token"]


def test_an_alarm_shows_both_of_its_numbers_and_stays_in_every_later_picture() -> None:
    seen = Seen()
    seen.look([look(0, witness=0.859), look(10, alarm(), witness=0.401)])
    for step in range(11, 40):
        seen.step(record(step), 40, group("hi"))
        seen.look([look(0, witness=0.859), look(10, alarm(), witness=0.401), look(step, witness=0.5)])
        rows = " ".join(" ".join(shown(seen, 80, 20)).split())
        assert "1 (1 alert); alert at step 10: since step 0 the reward rose from 0.443 to 0.621" in rows
        assert "0.859 to 0.401" in rows


def test_alarms_are_counted_and_the_latest_is_named_first() -> None:
    seen = full("hi")
    seen.look([look(0), look(5, alarm(5, "warn", "one")), look(10, alarm(10, "alert", "two"), alarm(10, "note", "three"))])
    rows = shown(seen, 100, 40)
    at = next(n for n, row in enumerate(rows) if "alarms" in row)
    assert rows[at].split(None, 1)[1] == "3 (1 alert, 1 warn, 1 note); note at step 10: three"
    assert [row.strip() for row in rows[at + 1 : at + 3]] == ["alert at step 10: two", "warn at step 5: one"]


def test_without_looks_nothing_is_said_of_alarms_and_with_looks_that_there_are_none() -> None:
    seen = Seen()
    seen.step(record(1), 2, None)
    assert not any("alarms" in row for row in shown(seen))
    seen.look([look(0, witness=0.5)])
    assert any(row.split() == ["alarms", "none"] for row in shown(seen))


def test_the_reward_is_shown_with_spread_curve_and_what_it_was_at_first() -> None:
    assert any(row.startswith(" reward     0.700 ± 0.250  ▁▂▃▅▆▇█  first 0.100 (+0.600)") for row in shown(full()))
    assert any(row.startswith(" reward     0.700 +- 0.250  _.-=+*#  first 0.100 (+0.600)") for row in shown(full(), ascii_only=True))


def test_the_reward_stands_before_the_loss() -> None:
    rows = "\n".join(shown(full("hi"), 100, 60))
    assert rows.index("reward ") < rows.index("details") < rows.index("loss 7")


def test_a_step_that_nothing_could_score_says_so() -> None:
    seen = Seen()
    seen.step(StepRecord(1, {}, {"reward_std": 0.0}), 2, None)
    assert any("no reply of this step could be scored" in row for row in shown(seen))


def test_witnesses_are_shown_with_their_change_since_the_first_look() -> None:
    rows = " ".join(" ".join(shown(full("hi"))).split())
    assert "witnesses step 10: reward 0.621 +0.178 held-out judge 0.401 -0.458 gold 0.350 +0.050 strayed 4% +4" in rows
    assert "KL per reply 1.20 +1.20 refuses harmful 90% +40" in rows


@pytest.mark.parametrize("width", [100, SIDE_BY_SIDE])
def test_best_and_worst_are_shown_with_the_parts_of_their_rewards(width: int) -> None:
    rows = shown(full("how are you?"), width, 60)
    for expected in ("prompt     how are you?", "best  0.88 fine how are you?", "worst 0.12 poor how are you?"):
        assert any(row.endswith(expected) for row in rows)
    assert any("judge 2.250  overlong -0.500  how are y 1.000" in row for row in rows)
    assert any("judge -1.500  3 others 0" in row for row in rows)


def test_a_group_without_a_single_score_is_left_out() -> None:
    seen, one = full("hi"), group("hi")
    seen.step(record(8), 12, ScoredGroup(one.group, (None, None, None), {}, one.advantages))
    assert not any("best" in row for row in shown(seen))


def test_a_long_reply_has_the_rows_that_are_free() -> None:
    seen = full("word " * 300)
    rows = {height: sum("word" in row for row in shown(seen, 80, height)) for height in (24, 60)}
    assert rows[60] > rows[24] + 10


def test_wide_the_last_group_stands_beside_the_numbers() -> None:
    rows = shown(full("hi"), 200, 46)
    assert any("witnesses" in row and "prompt" in row for row in rows)
    assert len(rows) < len(shown(full("hi"), 100, 46))


def test_the_time_left_says_what_is_in_it() -> None:
    rows = shown(full("hi"))
    assert any(row.endswith("step 7/12  ETA 0:49") for row in rows)  # 5 steps of 5 s, looks at 10 and 12 of 2 s, 10 for the evaluation
    assert any(row.split(None, 1) == ["ETA", "steps 0:25  looks 0:04  evaluation 0:20  unknown yet: checkpoints"] for row in rows)


def test_when_it_is_over_no_time_is_left_and_nothing_is_under_way() -> None:
    seen = full("hi")
    seen.over = True
    rows = "\n".join(shown(seen))
    assert "ETA" not in rows
    assert "training:" not in rows
    assert "step 7/12" in rows


def test_the_phase_says_how_long_it_goes_and_may_go() -> None:
    seen = Seen()
    seen.begin("evaluation: 200 held-out prompts", 90.0)
    assert shown(seen) == [" evaluation: 200 held-out prompts  1:12 of about 1:30"]


def test_warnings_are_counted_and_the_last_one_stays() -> None:
    seen = full("hi")
    assert any(row.startswith(" warnings   7; last: warned hi") for row in shown(seen, 80, 16))


def test_a_damaged_look_spoils_nothing() -> None:
    for damaged in ({}, {"step": "x", "metrics": 3, "alarms": 7}, {"metrics": {"witness": "high", "gold": None}, "alarms": ["?", {}]}):
        seen = full("hi")
        seen.look([damaged, damaged])
        assert any("reward" in row for row in shown(seen))
