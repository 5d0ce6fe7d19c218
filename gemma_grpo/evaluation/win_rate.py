"""Win rates that length cannot buy: what the rate would be if both replies had the same length.

A judge that likes long replies gives a policy that writes longer ones a win rate it has not earned. A logistic curve in the difference of
length is fitted to the wins, and read where that difference is 0 (length-controlled AlpacaEval, arXiv:2404.04475, without its terms for
model and instruction: two policies are compared on one set of prompts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_grpo.evaluation.intervals import cluster_counts, percentile_levels

PRIOR_STD = 5.0, 100.0
"""Of theta and phi, in log-odds: where all wins are on one side, or are those of the longer reply, the likelihood has no maximum. Length
is believed first: wins that it explains alone say nothing else."""
_STEPS = 200


def length_controlled(
    clusters: Sequence[str], wins: Sequence[float], differences: Sequence[float], *, seed: int, resamples: int = 2000
) -> dict[str, Any]:
    """{"value", "interval", "length_effect"}: sigmoid(theta) of p = sigmoid(theta + phi tanh(difference / std)), and phi.

    `wins` are 1, 0.5 for a tie, 0; `differences` are tokens of the judged reply minus those of its opponent; the 95 % interval draws
    whole clusters, and is None below two.
    """
    y, raw = np.asarray(wins, dtype=np.float64), np.asarray(differences, dtype=np.float64)
    spread = raw.std()
    x = np.tanh(raw / spread) if spread else np.zeros_like(raw)
    theta, phi = _fit(np.ones((1, len(y))), x, y)
    drawn = cluster_counts(clusters, seed=seed, resamples=resamples)
    interval = None
    if drawn is not None:
        owner, draws = drawn
        values = np.concatenate([_sigmoid(_fit(counts[:, owner], x, y)[0]) for counts in draws])
        interval = [float(end) for end in np.percentile(values, percentile_levels(owner.max() + 1))]
    return {"value": float(_sigmoid(theta)[0]), "interval": interval, "length_effect": float(phi[0])}


def _fit(weights: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """theta and phi, [draws] each, of the most likely curve under weights [draws, items]: Newton's steps on a concave function."""
    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))
    prior, prior_length = (std**-2 for std in PRIOR_STD)
    for _ in range(_STEPS):
        p = _sigmoid(theta[:, None] + phi[:, None] * x)
        slack, curve = weights * (y - p), weights * p * (1 - p)
        g0, g1 = slack.sum(1) - prior * theta, slack @ x - prior_length * phi
        h00, h01, h11 = curve.sum(1) + prior, curve @ x, curve @ (x * x) + prior_length
        determinant = h00 * h11 - h01 * h01
        step0, step1 = (h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant
        longest = np.maximum(np.maximum(abs(step0), abs(step1)), 1.0)  # far from the top a full step can overshoot
        theta, phi = theta + step0 / longest, phi + step1 / longest
        if max(abs(step0).max(), abs(step1).max()) < 1e-10:
            break
    return theta, phi


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = 0.5 * (1 + np.tanh(x / 2))
    return result
