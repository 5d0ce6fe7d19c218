"""Length control, against effects that were planted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gemma_grpo.evaluation import length_controlled


def planted(theta: float, phi: float, shift: float, *, count: int, seed: int) -> tuple[list[str], list[float], list[float]]:
    """Wins drawn from the very curve, with replies that are `shift` tokens longer on average."""
    rng = np.random.default_rng(seed)
    differences = rng.normal(loc=shift, scale=20.0, size=count)
    p = 1 / (1 + np.exp(-(theta + phi * np.tanh(differences / differences.std()))))
    return [str(n) for n in range(count)], [float(win) for win in rng.random(count) < p], differences.tolist()


@pytest.mark.parametrize("theta", [-0.7, 0.0, 0.5])
def test_a_planted_quality_is_recovered_whatever_length_adds(theta: float) -> None:
    clusters, wins, differences = planted(theta, phi=1.5, shift=15.0, count=6000, seed=3)
    found = length_controlled(clusters, wins, differences, seed=0, resamples=200)
    truth = 1 / (1 + math.exp(-theta))
    assert found["value"] == pytest.approx(truth, abs=0.03)
    assert found["length_effect"] == pytest.approx(1.5, abs=0.2)
    assert found["interval"][0] < truth < found["interval"][1]
    assert abs(np.mean(wins) - truth) > 0.08  # the raw rate is another number: length did add something


def test_wins_that_length_alone_explains_are_worth_a_half() -> None:
    # the judge takes the longer reply, always; the policy's are longer in nine of ten
    rng = np.random.default_rng(0)
    differences = np.where(np.arange(1000) % 10, 1.0, -1.0) * rng.uniform(5, 40, size=1000)
    found = length_controlled([str(n) for n in range(1000)], (differences > 0).astype(float).tolist(), differences.tolist(), seed=0)
    assert np.mean(differences > 0) == 0.9
    assert found["value"] == pytest.approx(0.5, abs=0.06)


def test_equal_lengths_leave_the_plain_rate_and_ties_count_half() -> None:
    wins = [1.0, 1.0, 1.0, 0.5, 0.0] * 200  # 3.5 of 5
    found = length_controlled([str(n) for n in range(1000)], wins, [0.0] * 1000, seed=0, resamples=200)
    assert found["value"] == pytest.approx(0.7, abs=1e-3)  # the weak prior pulls by less
    assert found["length_effect"] == 0.0


def test_swapping_sides_turns_the_rate_into_its_complement() -> None:
    clusters, wins, differences = planted(0.4, phi=-1.0, shift=5.0, count=500, seed=1)
    one = length_controlled(clusters, wins, differences, seed=0, resamples=50)
    other = length_controlled(clusters, [1 - win for win in wins], [-d for d in differences], seed=0, resamples=50)
    assert one["value"] + other["value"] == pytest.approx(1.0, abs=1e-9)


def test_all_wins_have_a_finite_answer_and_one_conversation_no_interval() -> None:
    found = length_controlled(["a"] * 20, [1.0] * 20, [float(n) for n in range(20)], seed=0)
    assert 0.9 < found["value"] < 1.0
    assert found["interval"] is None


def test_the_interval_covers_the_planted_rate_about_95_times_in_100() -> None:
    truth, covered = 1 / (1 + math.exp(-0.3)), 0
    for seed in range(300):
        clusters, wins, differences = planted(0.3, phi=1.0, shift=10.0, count=150, seed=seed)
        low, high = length_controlled(clusters, wins, differences, seed=seed, resamples=300)["interval"]
        covered += low <= truth <= high
    assert 0.92 < covered / 300 < 0.98  # the simulation's own error is 0.013
