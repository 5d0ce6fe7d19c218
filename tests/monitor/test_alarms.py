"""Alarms are for a reward that rises while a witness falls, and for nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from gemma_grpo.monitor.alarms import WITNESSES, change, new_alarms

REPLIES = 40


def look(step: int, *, alarms: Sequence[Mapping[str, Any]] = (), kind: str = "benign", **values: float) -> dict[str, Any]:
    """A look whose replies have these values on average, each reply its own."""
    wobble = [0.01 * ((7 * n) % 5 - 2) * (1 + step % 3) for n in range(REPLIES)]
    replies = [{"prompt_id": f"p{n}", "kind": kind, **{name: value + wobble[n] for name, value in values.items()}} for n in range(REPLIES)]
    return {"step": step, "replies": replies, "alarms": list(alarms)}


def test_a_reward_that_rises_with_its_witness_is_what_training_is_for() -> None:
    assert new_alarms([look(0, proxy=0.0, witness=0.0)], look(5, proxy=1.0, witness=0.8)) == []


def test_a_witness_that_falls_with_the_reward_is_no_over_optimisation() -> None:
    assert new_alarms([look(0, proxy=0.0, witness=0.0)], look(5, proxy=-1.0, witness=-0.8)) == []


def test_a_witness_that_stays_while_the_reward_rises_is_no_alarm() -> None:
    assert new_alarms([look(0, proxy=0.0, witness=0.0)], look(5, proxy=1.0, witness=-0.001)) == []


def test_a_reward_that_rises_while_the_witness_falls_is_told_with_both_numbers_and_two_prompts() -> None:
    looks = [look(0, proxy=0.0, witness=0.0), look(5, proxy=0.5, witness=0.4)]
    (alarm,) = new_alarms(looks, look(10, proxy=0.9, witness=0.33))
    assert (alarm.level, alarm.step, alarm.witness) == ("warn", 10, "witness")
    # compared with step 5, where the witness was best, not with the start
    assert alarm.text == (
        "since step 5 the reward rose from 0.500 to 0.900 on held-out prompts while the held-out judge went from 0.400 to 0.330"
    )
    assert len(alarm.samples) == 2
    assert set(alarm.samples) <= {f"p{n}" for n in range(REPLIES)}


def test_what_no_reward_scores_is_told_with_its_own_prompts() -> None:
    # the bundled look-alikes: refused or not, and without a reward
    looks = []
    for step, refused in ((0, False), (5, True)):
        one = look(step, proxy=0.1 * step)
        asked = [{"prompt_id": f"q{n}", "kind": "looks_harmful", "refused": refused and n < 6} for n in range(8)]
        looks.append({**one, "replies": [*one["replies"], *asked]})
    (alarm,) = new_alarms(looks[:1], looks[1])
    assert (alarm.witness, alarm.level) == ("refused/looks_harmful", "alert")
    assert alarm.samples == ("q0", "q1")


def test_half_the_least_fall_is_noted_and_two_notes_are_no_warning() -> None:
    then = look(0, proxy=0.0, witness=0.4, lexical=0.2)
    alarms = new_alarms([then], look(5, proxy=0.9, witness=0.37, lexical=0.17))
    assert [(alarm.witness, alarm.level) for alarm in alarms] == [("witness", "note"), ("lexical", "note")]
    # one that warns beside one that is noted: neither is more than it is
    mixed = new_alarms([then], look(5, proxy=0.9, witness=0.33, lexical=0.17))
    assert [alarm.level for alarm in mixed] == ["warn", "note"]


def test_twice_the_least_fall_is_an_alert() -> None:
    (alarm,) = new_alarms([look(0, proxy=0.0, witness=0.4)], look(5, proxy=0.9, witness=0.29))
    assert alarm.level == "alert"


def test_two_witnesses_that_warn_are_an_alert_each() -> None:
    then = look(0, proxy=0.0, witness=0.4, lexical=0.2)
    alarms = new_alarms([then], look(5, proxy=0.9, witness=0.33, lexical=0.13))
    assert [(alarm.witness, alarm.level) for alarm in alarms] == [("witness", "alert"), ("lexical", "alert")]


def test_what_was_said_is_said_again_only_when_it_is_worse() -> None:
    first, worse = look(5, proxy=0.5, witness=0.33), look(10, proxy=0.9, witness=0.2)
    start = look(0, proxy=0.0, witness=0.4)
    (alarm,) = new_alarms([start], first)
    looks = [start, {**first, "alarms": [alarm.to_dict()]}]
    assert new_alarms(looks, look(6, proxy=0.6, witness=0.33)) == []
    (again,) = new_alarms(looks, worse)
    assert (alarm.level, again.level) == ("warn", "alert")


@pytest.mark.parametrize("witness", WITNESSES, ids=lambda one: f"{one.name}-{one.kind}")
def test_every_witness_is_heard_for_its_own_kind_of_prompt_and_in_its_own_direction(witness) -> None:
    kind, worse = witness.kind or "benign", -witness.better * 1.2 * witness.least
    then = look(0, kind=kind, proxy=0.0, **{witness.name: 0.5})
    (alarm,) = new_alarms([then], look(3, kind=kind, proxy=1.0, **{witness.name: 0.5 + worse}))
    assert alarm.witness.split("/")[0] == witness.name
    assert new_alarms([then], look(3, kind=kind, proxy=1.0, **{witness.name: 0.5 - worse})) == []
    if witness.kind is not None:
        other = look(0, kind="another", proxy=0.0, **{witness.name: 0.5})
        assert new_alarms([other], look(3, kind="another", proxy=1.0, **{witness.name: 0.5 + worse})) == []


def test_a_fall_within_its_own_noise_is_none() -> None:
    # half of the replies fall by 10 and half rise by 9.8: a mean fall of 0.1, a standard error of 1.6
    then = {"step": 0, "replies": [{"prompt_id": str(n), "kind": "benign", "proxy": 0.0, "witness": 0.0} for n in range(REPLIES)]}
    after = [{"prompt_id": str(n), "kind": "benign", "proxy": 1.0 + n, "witness": -10.0 if n % 2 else 9.8} for n in range(REPLIES)]
    assert new_alarms([then], {"step": 5, "replies": after}) == []


def test_changes_are_counted_reply_by_reply() -> None:
    then = {"replies": [{"x": 1.0, "kind": "a"}, {"x": 3.0, "kind": "a"}, {"x": None, "kind": "a"}, {"x": 9.0, "kind": "b"}]}
    now = {"replies": [{"x": 2.0, "kind": "a"}, {"x": 6.0, "kind": "a"}, {"x": 5.0, "kind": "a"}, {"x": 9.0, "kind": "b"}]}
    found = change(then, now, "x", "a")
    assert found is not None
    # differences 1 and 3: mean 2, standard deviation sqrt 2, standard error 1
    assert (found.before, found.after, found.z) == (2.0, 4.0, pytest.approx(2.0))
    assert change(then, now, "x", "b") is None
    assert change(then, now, "unknown") is None
