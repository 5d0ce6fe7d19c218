"""Gao et al.'s laws, fitted to points that follow them."""

from __future__ import annotations

import math

import pytest

from gemma_grpo.evaluation import Frontier, best_of_n_kl, fit_frontier

DISTANCES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]


def test_the_laws_constants_and_peaks_are_found() -> None:
    rl = fit_frontier(DISTANCES, [d * (0.9 - 0.4 * math.log(d)) if d else 0.0 for d in DISTANCES], "rl")
    best = fit_frontier(DISTANCES, [d * (0.9 - 0.2 * d) for d in DISTANCES], "best_of_n")
    assert rl is not None
    assert best is not None
    assert (rl.a, rl.b, rl.rmse) == (pytest.approx(0.9), pytest.approx(0.4), pytest.approx(0.0, abs=1e-12))
    assert (best.a, best.b) == (pytest.approx(0.9), pytest.approx(0.2))
    # d (a - b log d) is steepest no more where a - b log d = b; d (a - b d) where a = 2 b d
    assert rl.peak == pytest.approx(math.exp(0.9 / 0.4 - 1))
    assert best.peak == pytest.approx(2.25)
    for law in (rl, best):
        assert law.peak is not None
        assert law.at(law.peak) > max(law.at(0.9 * law.peak), law.at(1.1 * law.peak))
        assert law.at(0.0) == 0.0


def test_a_reward_that_never_turns_has_no_peak_and_two_points_no_law() -> None:
    rising = fit_frontier(DISTANCES, [d * (0.5 + 0.1 * d) for d in DISTANCES], "best_of_n")
    assert rising is not None
    assert rising.peak is None
    # nearly straight: the place where it would turn is beyond all numbers
    straight = Frontier("rl", 1.0, 1e-6, 0.0)
    assert (straight.peak, Frontier("best_of_n", 1.0, 1e-6, 0.0).peak) == (None, None)
    assert fit_frontier([0.0, 1.0, 2.0], [0.0, 1.0, 1.5], "rl") is None


def test_the_kl_of_best_of_n_is_the_papers() -> None:
    assert (best_of_n_kl(1), best_of_n_kl(8), best_of_n_kl(16)) == (0.0, pytest.approx(1.2044, abs=1e-4), pytest.approx(1.8351, abs=1e-4))
    with pytest.raises(ValueError, match="best-of-0 picks from nothing"):
        best_of_n_kl(0)
