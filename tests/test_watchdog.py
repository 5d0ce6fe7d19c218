"""A phase that takes far longer than it used to is told, with what is being waited for, and nothing is ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from gemma_grpo import watchdog
from gemma_grpo.watchdog import current, phase, watching

Told = list[tuple[str, list[str]]]


@pytest.fixture
def told() -> Told:
    return []


def say_into(told: Told) -> Callable[[str, list[str]], None]:
    return lambda text, stack: told.append((text, stack))


def wait_here(told: Told, count: int = 1, most: float = 20.0) -> None:
    """Until it was told so often, or for `most` seconds."""
    until = time.monotonic() + most
    while len(told) < count and time.monotonic() < until:
        time.sleep(0.005)


def test_what_is_done_now_is_the_innermost_phase() -> None:
    assert current() == ""
    with phase("update"):
        assert current() == "update"
        with phase("saving"):
            assert current() == "saving"
        assert current() == "update"
    with pytest.raises(KeyError), phase("rollout"):
        raise KeyError
    assert current() == ""


def test_a_phase_far_over_its_median_is_told_with_its_detail_and_its_place(told: Told) -> None:
    with watching(say_into(told), factor=3, floor_seconds=0.05):
        for _ in range(3):
            with phase("rollout"):
                time.sleep(0.01)
        with phase("rollout", "step 4, prompts a1, b2"):
            wait_here(told)
    text, stack = told[0]
    assert text.startswith("rollout has taken ")
    assert "times its median of 0.01" in text
    assert "(step 4, prompts a1, b2): waiting in wait_here (tests/test_watchdog.py:" in text
    assert any(frame.startswith("wait_here (tests/test_watchdog.py:") for frame in stack)


def test_a_phase_is_told_again_after_twice_the_time(told: Told) -> None:
    with watching(say_into(told), factor=2, floor_seconds=0.004), phase("loading"):
        started = time.monotonic()
        wait_here(told, count=3)
        passed = time.monotonic() - started
    assert len(told) >= 3
    assert passed >= 0.16  # a phase not known yet: 10 x 0.004, then 0.08, then 0.16


def test_ordinary_phases_and_short_ones_are_not_told(told: Told) -> None:
    with watching(say_into(told), factor=2, floor_seconds=5):
        for _ in range(10):
            with phase("rollout"):
                time.sleep(0.001)
        with phase("rollout"):
            time.sleep(0.1)  # a hundred times the median, and far below the floor
    assert told == []


def test_without_a_factor_nothing_is_watched() -> None:
    before = threading.active_count()
    with watching(lambda text, stack: None, factor=None, floor_seconds=0.001), phase("rollout"):
        assert threading.active_count() == before
        assert current() == "rollout"


def test_a_phase_that_failed_says_nothing_about_how_long_it_takes(told: Told) -> None:
    with watching(say_into(told), factor=2, floor_seconds=0.01):
        for _ in range(5):
            with pytest.raises(ValueError, match="broken"), phase("reward"):
                raise ValueError("broken")
        assert not watchdog._state.seconds["reward"]


def test_a_run_says_what_it_waits_for_and_goes_on(train_tiny: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    calls = 0

    def slow_scorer(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 5:
            time.sleep(1.5)
        return [sum(ids) / len(ids) / 100 for ids in completion_ids]

    settings = {"max_steps": 6, "watchdog.factor": 2.0, "watchdog.floor_seconds": 0.2}
    run = train_tiny(reward=slow_scorer, **settings)
    late = [line for line in run.lines("events.jsonl") if line["kind"] == "late" and line["text"].startswith("reward has")]
    prompts = [line["prompt_id"] for line in run.lines("samples.jsonl") if line["step"] == 5]
    assert late, "the fifth reward was not told"
    assert f"(step 5, prompts {', '.join(prompts)}): waiting in slow_scorer (tests/test_watchdog.py:" in late[0]["text"]
    assert "called by _answer (gemma_grpo/reward/functions.py:" in late[0]["text"]
    assert "warning: reward has taken" in capsys.readouterr().out
    assert len(run.lines("metrics.jsonl")) == 6
    quiet = train_tiny(reward=slow_scorer, **{**settings, "watchdog.floor_seconds": 60.0})
    assert not [line for line in quiet.lines("events.jsonl") if line["kind"] == "late"]
