"""Intervals by resampling whole conversations: replies of one conversation are not independent (docs/method.md, evaluation)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1000
"""Bootstrap draws at a time: memory is chunk x conversations numbers."""
_Z = 1.959963984540054


def percentile_levels(clusters: int) -> tuple[float, float]:
    """Which percentiles of the bootstrap draws make a 95 % interval, widened for few clusters: (2.5, 97.5) for infinitely many.

    A plain percentile interval is too narrow by the root of n / (n - 1) and as if the spread were known; this is Hesterberg's expanded
    percentile interval, arXiv:1411.5279. Student's quantile is Cornish and Fisher's expansion of it.
    """
    freedom = clusters - 1
    g1, g2 = (_Z**3 + _Z) / 4, (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
    student = _Z + g1 / freedom + g2 / freedom**2
    low = 100 * NormalDist().cdf(-student * math.sqrt(clusters / freedom))
    return low, 100 - low


def cluster_counts(clusters: Sequence[str], *, seed: int, resamples: int) -> tuple[NDArray[np.intp], Iterator[NDArray[np.float64]]] | None:
    """Each item's cluster, and how often each cluster is drawn, [draws, clusters] at a time; None below two clusters."""
    names, owner = np.unique(np.asarray(clusters), return_inverse=True)
    if len(names) < 2:
        return None
    rng = np.random.default_rng(seed)
    sizes = [min(_CHUNK, resamples - start) for start in range(0, resamples, _CHUNK)]
    return owner, (rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=size).astype(np.float64) for size in sizes)


def bootstrap_intervals(
    clusters: Sequence[str], sums: NDArray[np.float64], *, seed: int, resamples: int = 10_000
) -> NDArray[np.float64] | None:
    """95 % intervals, [metrics, 2], of after - before, when whole clusters are drawn with replacement.

    `sums` is [items, metrics, 4]: before and after are ratios of sums, and the last axis is numerator and denominator before,
    numerator and denominator after. None below two clusters. All metrics see the same draws.
    """
    drawn = cluster_counts(clusters, seed=seed, resamples=resamples)
    if drawn is None:
        return None
    owner, draws = drawn
    totals = np.zeros((owner.max() + 1, *sums.shape[1:]))
    np.add.at(totals, owner, sums)
    gains = []
    for counts in draws:
        before, after = ratios(np.tensordot(counts, totals, axes=1))  # (draws, metrics, 4)
        gains.append(after - before)
    return np.percentile(np.concatenate(gains), percentile_levels(len(totals)), axis=0).T


def ratios(sums: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Before and after, of numerators and denominators in the last axis."""
    # a denominator of 0 (replies without a single token) has numerator 0 too
    before, after = (sums[..., k] / np.maximum(sums[..., k + 1], 1) for k in (0, 2))
    return before, after
