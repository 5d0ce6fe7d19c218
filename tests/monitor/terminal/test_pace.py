"""Laws of the time that is left: worked out by hand, from what was measured, and it says what it contains."""

from __future__ import annotations

import pytest

from gemma_grpo.monitor.terminal.pace import Pace, Schedule


def test_steps_looks_checkpoints_and_the_evaluation_are_in_it() -> None:
    pace = Pace(Schedule(look_every=5, save_every=4, evaluation_looks=10))
    pace.took("look", 2.0, 0)
    for step in range(1, 6):
        pace.step({"rollout": 3.0, "update": 1.0})
        if step == 4:
            pace.took("checkpoint", 0.5, 4)
    pace.took("look", 4.0, 5)
    left = pace.left(5, 12)
    # 7 steps of 4 s; looks at 10 and 12 of 3 s; checkpoints at 8 and 12 of 0.5 s; an evaluation of 10 looks of 3 s
    assert left.parts == {"steps": 28.0, "looks": 6.0, "checkpoints": 1.0, "evaluation": 30.0}
    assert left.unknown == ()
    assert left.seconds == 65.0


def test_a_look_that_follows_the_step_just_made_is_still_to_come() -> None:
    pace = Pace(Schedule(look_every=5))
    pace.took("look", 2.0, 0)
    pace.step({"rollout": 1.0})
    assert pace.left(5, 10).parts["looks"] == 4.0  # at 5 and at 10
    pace.took("look", 2.0, 5)
    assert pace.left(5, 10).parts["looks"] == 2.0


def test_what_was_not_measured_is_named_and_not_counted() -> None:
    pace = Pace(Schedule(look_every=5, save_every=0, evaluation_looks=3))
    pace.step({"rollout": 1.0})
    left = pace.left(1, 11)
    assert left.parts == {"steps": 10.0}
    assert left.unknown == ("looks", "checkpoints", "evaluation")


def test_a_run_that_neither_looks_nor_saves_nor_evaluates_waits_for_its_steps_alone() -> None:
    pace = Pace()
    pace.step({"rollout": 1.0})
    assert (pace.left(1, 3).parts, pace.left(1, 3).unknown) == ({"steps": 2.0}, ())


def test_with_save_steps_0_there_is_one_checkpoint_at_the_end() -> None:
    schedule = Schedule(save_every=0)
    assert [step for step in range(1, 9) if schedule.due("checkpoint", step, 8)] == [8]


def test_an_evaluation_that_is_over_is_not_waited_for() -> None:
    pace = Pace(Schedule(evaluation_looks=3))
    pace.took("evaluation", 9.0, 4)
    assert "evaluation" not in pace.left(4, 4).parts
    assert pace.mean("evaluation") == 9.0


def test_the_first_step_which_warms_up_does_not_count_unless_it_is_the_only_one() -> None:
    pace = Pace()
    pace.step({"rollout": 100.0})
    assert pace.left(1, 2).seconds == 100.0
    pace.step({"rollout": 2.0})
    assert pace.left(2, 12).seconds == 20.0


def test_only_the_last_twenty_steps_count_for_those_to_come() -> None:
    pace = Pace()
    for seconds in [5.0] * 30 + [1.0] * 20:
        pace.step({"rollout": seconds})
    assert pace.left(50, 60).seconds == 10.0


def test_the_shares_have_what_is_done_beside_the_steps_in_them_last() -> None:
    pace = Pace()
    pace.took("look", 2.0, 0)
    pace.step({"rollout": 5.0, "update": 3.0})
    assert pace.shares() == pytest.approx({"rollout": 0.5, "update": 0.3, "look": 0.2})
    assert list(pace.shares()) == ["rollout", "update", "look"]
