"""profile.json as a table: what stands in each cell, what is said below, and that nothing in the file is left out."""

from __future__ import annotations

from typing import Any

import pytest

from gemma_grpo.monitor.profile_table import profile_notes, profile_rows

PROFILE: dict[str, Any] = {
    "device": "CPU, 2 threads",
    "dtype": "float32",
    "operations": {"value": 1.5e11, "spread": 0.125},
    "bytes": {"value": 3e10, "spread": 0.25},
    "steps": {"earlier": 0, "profiled": 3, "counted": [2, 3]},
    "phases": {
        "rollout": {"seconds": 30.0, "share": 0.6, "floor_seconds": 10.0, "ratio": 3.0, "tokens": 6000, "tokens_per_second": 200.0},
        "reward": {"seconds": 20.0, "share": 0.4, "floor_seconds": 0.0, "ratio": None, "tokens": 0, "tokens_per_second": None},
    },
    "total": {"seconds": 50.0, "floor_seconds": 10.0, "ratio": 5.0},
    "outside": {"before the steps": 5.25, "first step, warm-up": 0.5, "after the steps": 0.0},
    "session_seconds": 55.75,
    "advice": "rollout took 60% of the time.",
}


def test_each_phase_their_sum_and_everything_outside_of_them_is_a_row() -> None:
    assert profile_rows(PROFILE) == [
        ["phase", "seconds", "share", "floor", "x floor", "tokens", "tokens/s"],
        ["rollout", "30.0", "60.0%", "10.0", "3.0", "6000", "200"],
        ["reward", "20.0", "40.0%", "-", "-", "-", "-"],
        ["steps 2 to 3", "50.0", "100.0%", "10.0", "5.0", "-", "-"],
        ["before the steps", "5.25", "-", "-", "-", "-", "-"],
        ["first step, warm-up", "0.50", "-", "-", "-", "-", "-"],
        ["all of it", "55.8", "-", "-", "-", "-", "-"],
    ]


def test_the_notes_tell_the_machine_the_floor_and_what_could_be_done() -> None:
    machine, floor, advice = profile_notes(PROFILE)
    assert machine == (
        "Measured here (CPU, 2 threads, float32): 150 Gop/s in matrix products, 30 GB/s read from memory; "
        "repeats differed by up to 12.5% and 25.0%."
    )
    assert floor.startswith("The floor is the time that the work counted from the real tokens takes")
    assert advice == "rollout took 60% of the time."


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": {"earlier": 12, "counted": [14, 14]}}, "The run's first 12 steps were made in an earlier session and are not in it."),
        ({"bytes": {"value": 1.0, "spread": 0.5}}, "Something else kept this machine busy while it was measured"),
        ({"phases": {}, "advice": ""}, "No step was run in this session, so there is nothing to compare with the floor."),
    ],
)
def test_what_makes_the_numbers_special_is_said(changes: dict[str, Any], sentence: str) -> None:
    assert [note for note in profile_notes({**PROFILE, **changes}) if note.startswith(sentence)]
    assert not [note for note in profile_notes(PROFILE) if note.startswith(sentence)]


def test_without_a_step_there_is_no_table() -> None:
    assert profile_rows({**PROFILE, "phases": {}}) == []


def test_one_step_is_called_by_its_number() -> None:
    assert profile_rows({**PROFILE, "steps": {"counted": [14, 14]}})[3][0] == "step 14"


def test_the_table_fits_a_terminal_of_eighty_columns() -> None:
    long = {**PROFILE["phases"]["rollout"], "seconds": 123456.7, "floor_seconds": 12345.6, "ratio": 123.4, "tokens": 10**9}
    rows = profile_rows({**PROFILE, "phases": {"reference": {**long, "tokens_per_second": 99999.0}}})
    assert sum(max(map(len, column)) for column in zip(*rows, strict=True)) + 2 * len(rows[0]) <= 80
