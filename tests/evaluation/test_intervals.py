"""Intervals by resampling conversations, against answers that are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from gemma_grpo.evaluation import bootstrap_intervals, percentile_levels


@pytest.mark.parametrize("clusters", [5, 10, 30, 100, 10_000])
def test_the_percentiles_are_widened_as_students_distribution_asks(clusters: int) -> None:
    student = stats.t.ppf(0.975, clusters - 1)
    expected = 100 * stats.norm.cdf(-student * np.sqrt(clusters / (clusters - 1)))
    low, high = percentile_levels(clusters)
    assert low == pytest.approx(expected, abs=0.05)
    assert high == pytest.approx(100 - low)


def test_with_many_conversations_the_percentiles_are_the_plain_ones() -> None:
    assert percentile_levels(10**6) == (pytest.approx(2.5, abs=1e-3), pytest.approx(97.5, abs=1e-3))


def paired_sums(gains: np.ndarray) -> np.ndarray:
    """Before 0, after the gain, one reply each: [items, 1, 4]."""
    ones = np.ones_like(gains)
    return np.stack([np.zeros_like(gains), ones, gains, ones], axis=-1)[:, None, :]


@pytest.mark.parametrize("conversations", [12, 40, pytest.param(200, marks=pytest.mark.slow)])
def test_a_95_percent_interval_covers_the_truth_in_94_to_96_of_100_simulated_evaluations(conversations: int) -> None:
    # gain = 0.3 + what is the conversation's + what is the reply's; three replies to each
    rng, truth, covered, simulations = np.random.default_rng(0), 0.3, 0, 3000
    clusters = [str(n) for n in range(conversations) for _ in range(3)]
    for index in range(simulations):
        gains = truth + np.repeat(rng.normal(size=conversations), 3) + rng.normal(size=3 * conversations)
        intervals = bootstrap_intervals(clusters, paired_sums(gains), seed=index, resamples=400)
        assert intervals is not None
        covered += intervals[0, 0] <= truth <= intervals[0, 1]
    assert 0.935 < covered / simulations < 0.965  # 0.95 +- 0.01, and three times the simulation's own error of 0.004 would be 0.012


def test_clustered_intervals_are_wider_where_conversations_differ_and_no_wider_where_they_do_not() -> None:
    rng = np.random.default_rng(1)
    of_conversation, of_reply = np.repeat(rng.normal(size=100), 5), rng.normal(size=500)
    together, alone = [str(n) for n in range(100) for _ in range(5)], [str(n) for n in range(500)]

    def width(clusters: list[str], gains: np.ndarray) -> float:
        intervals = bootstrap_intervals(clusters, paired_sums(gains), seed=0, resamples=4000)
        assert intervals is not None
        return float(intervals[0, 1] - intervals[0, 0])

    # variance of a mean of 5 replies: 1 + 1/5 of which each reply alone would show 2/5: the root of 1.2 / 0.4
    ratio = width(together, of_conversation + of_reply) / width(alone, of_conversation + of_reply)
    assert ratio == pytest.approx(np.sqrt(3), rel=0.15)
    assert width(together, of_reply) / width(alone, of_reply) == pytest.approx(1.0, rel=0.15)


def test_one_conversation_has_no_interval() -> None:
    assert bootstrap_intervals(["a", "a"], paired_sums(np.array([0.1, 0.2])), seed=0) is None
