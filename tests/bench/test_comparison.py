"""From samples to ratios: paired ones tell sides apart although the machine slows down on the way."""

from __future__ import annotations

import pytest

from bench.comparison import compare


def sample(seconds: float, peak: int) -> dict[str, object]:
    phases = {"rollout": seconds / 4, "update": seconds * 3 / 4}
    return {"seconds": seconds, "cpu_seconds": 2 * seconds, "phases": phases, "peak_bytes": peak, "tokens": 100}


def test_a_machine_that_slows_down_changes_no_paired_ratio() -> None:
    ours = [sample(seconds, 10) for seconds in (1.0, 2.0, 8.0)]
    trl = [sample(3 * seconds, 40) for seconds in (1.0, 2.0, 8.0)]
    found = compare(ours, trl)
    assert found["paired_ratio"] == {"median": 3.0, "min": 3.0, "max": 3.0}
    assert found["cpu_ratio"] == found["paired_ratio"]
    assert found["memory_ratio"] == {"median": 4.0, "min": 4.0, "max": 4.0}


def test_medians_are_of_each_side_and_ratios_of_each_pair() -> None:
    # ours 1 2 4, TRL 6 4 4: the medians' ratio is 4 / 2, the pairs' are 6, 2 and 1
    found = compare([sample(1, 1), sample(2, 1), sample(4, 1)], [sample(6, 1), sample(4, 3), sample(4, 2)])
    assert found["ratio_of_medians"] == 2.0
    assert found["paired_ratio"] == {"median": 2.0, "min": 1.0, "max": 6.0}
    assert found["ours"]["seconds"] == {"median": 2, "min": 1, "max": 4}
    assert found["ours"]["phases"] == {"rollout": 0.5, "update": 1.5}
    assert found["ours"]["tokens_per_second"] == 50.0
    assert found["trl"]["peak_bytes"] == {"median": 2, "min": 1, "max": 3}


def test_sides_of_different_length_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compare([sample(1, 1), sample(1, 1)], [sample(1, 1)])
