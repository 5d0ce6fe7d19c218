"""Where proxy and truth part, and which replies a person is shown: worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from gemma_grpo.monitor.watched import alarm_marks, curves, notable, parting, parting_lines


def look(step: int, proxy: float, alarms: tuple[dict[str, Any], ...] = (), **metrics: float) -> dict[str, Any]:
    return {"step": step, "metrics": {"proxy": proxy, **metrics}, "replies": [], "alarms": list(alarms)}


def alarm(step: int, level: str = "warn") -> dict[str, Any]:
    return {"level": level, "step": step, "witness": "fluency", "text": "t", "samples": []}


LOOKS = [
    look(0, 0.1, gold=0.30),
    look(4, 0.4, gold=0.50),
    look(8, 0.6, (alarm(8),), gold=0.48),
    look(12, 0.9, (alarm(12, "alert"),), gold=0.35),
]


def test_the_peak_the_end_and_what_was_lost_when_the_alarm_came() -> None:
    found = parting(LOOKS)
    assert found is not None
    assert (found.truth, found.peak_step, found.peak, found.end_step, found.end) == ("gold", 4, 0.50, 12, 0.35)
    assert found.lost == pytest.approx(0.15)
    assert found.parted
    assert found.alarm is not None
    assert found.alarm["step"] == 8
    assert found.lost_at_alarm == pytest.approx(0.02)
    assert parting_lines(found) == [
        "Gold was highest at step 4 (0.500) and ended at 0.350 (step 12).",
        "From there on the reward went on rising, from 0.400 to 0.900.",
        "The first alarm came at step 8, warn by fluency, when gold had lost 2.0 points of 100 from its best.",
        "Three points were lost for good at step 12, 4 steps after the alarm.",
    ]
    late = parting([*LOOKS[:2], look(8, 0.6, gold=0.46), look(10, 0.7, (alarm(10),), gold=0.4)])
    assert parting_lines(late)[-1] == "Three points were lost for good at step 8, 2 steps before the alarm."
    # what comes back was not lost
    back = parting([*LOOKS[:2], look(8, 0.6, (alarm(8),), gold=0.46), look(10, 0.7, gold=0.5)])
    assert back is not None
    assert back.lost_step is None


def test_a_note_is_no_alarm_and_a_run_that_ends_at_its_peak_has_not_parted() -> None:
    found = parting([look(0, 0.1, gold=0.3), look(4, 0.4, (alarm(4, "note"),), gold=0.5)])
    assert found is not None
    assert (found.alarm, found.lost_at_alarm, found.parted) == (None, None, False)
    assert parting_lines(found)[-1] == "No alarm came."


def test_without_gold_the_witness_is_the_measure_and_without_both_there_is_none() -> None:
    found = parting([look(0, 0.1, witness=0.3), look(4, 0.4, witness=0.2)])
    assert found is not None
    assert (found.truth, found.peak_step, found.parted) == ("witness", 0, True)
    assert parting([look(0, 0.1), look(4, 0.4)]) is None
    assert parting([look(0, 0.1, gold=0.3)]) is None
    assert parting_lines(None) == []


def test_curves_have_a_gap_where_a_look_lacks_a_number() -> None:
    assert curves([look(0, 0.1, gold=0.3), look(5, 0.2)])["gold"] == ([0.0, 5.0], [0.3, None])
    assert alarm_marks([look(0, 0.1, (alarm(0, "note"),))]) == []
    assert alarm_marks(LOOKS) == [(8.0, "warn"), (12.0, "alert")]


def test_the_replies_shown_are_the_best_the_worst_the_most_improved_and_the_most_suspicious() -> None:
    #           gold before, after; reward before, after
    numbers = {"good": (0.8, 0.9, 0.0, 0.1), "bad": (0.2, 0.0, 0.0, 0.2), "better": (0.1, 0.7, 0.0, 0.3), "gamed": (0.6, 0.3, 0.0, 2.0)}
    asked = {name: [{"role": "user", "content": name}] for name in numbers}
    first = [{"prompt_id": name, "gold": a, "proxy": c, "prompt": asked[name]} for name, (a, _, c, _) in numbers.items()]
    last = [{"prompt_id": name, "gold": b, "proxy": d} for name, (_, b, _, d) in numbers.items()]
    found = notable([{**look(0, 0.0), "replies": first}, {**look(4, 0.0), "replies": last}])
    assert [(one.why.split(":")[0], one.after["prompt_id"]) for one in found] == [
        ("best", "good"),
        ("worst", "bad"),
        ("most improved", "better"),
        ("most suspicious", "gamed"),
    ]
    assert found[0].prompt == [{"role": "user", "content": "good"}]
    assert notable(LOOKS) == []
