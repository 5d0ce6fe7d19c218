"""One run that is killed again and again ends as if nothing had happened, and what it was doing each time is known."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

import gemma_grpo
from reliability.phases import PLACES, phase_of
from reliability.trainer_kills import run


def test_the_phase_is_that_of_the_first_place_that_any_function_is_in() -> None:
    def _prune() -> str:
        return phase_of(sys._getframe())

    def save_checkpoint() -> str:
        return _prune()

    assert _prune() == "between"  # of another file
    PLACES["pruning"].add(("test_trainer_kills", "_prune"))
    PLACES["saving"].add(("test_trainer_kills", "save_checkpoint"))
    try:
        assert (_prune(), save_checkpoint()) == ("pruning", "pruning")
    finally:
        PLACES["pruning"].discard(("test_trainer_kills", "_prune"))
        PLACES["saving"].discard(("test_trainer_kills", "save_checkpoint"))
    assert phase_of(sys._current_frames().get(threading.get_ident())) == "between"


def test_every_place_that_is_looked_for_is_there() -> None:
    package = Path(gemma_grpo.__file__).parent
    for file, function in set().union(*PLACES.values()):
        assert any(f"def {function}(" in path.read_text(encoding="utf-8") for path in package.rglob(f"{file}.py")), (file, function)


def test_a_run_killed_six_times_ends_as_if_nothing_had_happened() -> None:
    report = run(kills=6, kills_per_run=6, seed=0)
    assert report["differing"] == []
    assert report["kills"] == 6
    assert report["files_compared"] >= 9


@pytest.mark.slow
def test_one_run_killed_a_hundred_times_while_it_does_all_it_does_ends_as_if_nothing_had_happened() -> None:
    report = run(kills=100, kills_per_run=100, seed=0)
    print(report)
    assert report["differing"] == []
    assert report["kills"] == 100
    assert report["kills_of_each_run"][0] >= 90  # a machine that got faster may let it finish in its evaluation
    assert {"loading", "saving", "pruning", "rollout", "update", "evaluation"} <= set(report["killed_while"])
