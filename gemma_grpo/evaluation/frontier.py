"""Reward against the distance travelled: how far a policy can go before more of the proxy is less of what it stands for.

With d = sqrt(KL per reply, nats): best-of-n follows R = d (a - b d), reinforcement learning R = d (a - b log d), both found by Gao et al.
(arXiv:2210.10760, section 3.1) for the gold reward. a is the slope at the start, b how fast it is eaten up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Law = Literal["best_of_n", "rl"]
_TERMS: dict[Law, Callable[[float], float]] = {"best_of_n": lambda d: d * d, "rl": lambda d: d * math.log(d)}


_FAR = 50.0
"""Of a / b: e to this power is no distance any more."""


@dataclass(frozen=True, slots=True)
class Frontier:
    """A fitted law."""

    law: Law
    a: float
    b: float
    rmse: float
    """Root mean square distance of the points from it, in reward."""

    def at(self, d: float) -> float:
        """Reward gained at distance d >= 0."""
        return self.a * d - self.b * _TERMS[self.law](d) if d else 0.0

    @property
    def peak(self) -> float | None:
        """The distance at which the reward is highest; None where the law has no such place (b <= 0), or none that anyone could reach."""
        if self.b <= 0 or self.a / self.b > _FAR:
            return None
        return self.a / (2 * self.b) if self.law == "best_of_n" else math.exp(self.a / self.b - 1)


def fit_frontier(distances: Sequence[float], gains: Sequence[float], law: Law) -> Frontier | None:
    """Least squares of a and b over points (sqrt KL, gain); points at distance 0 say nothing. None below three distances."""
    points = [(d, gain) for d, gain in zip(distances, gains, strict=True) if d > 0]
    if len({d for d, _ in points}) < 3:
        return None
    matrix = np.array([[d, -_TERMS[law](d)] for d, _ in points])
    target = np.array([gain for _, gain in points])
    (a, b), *_ = np.linalg.lstsq(matrix, target, rcond=None)
    rmse = float(np.sqrt(np.mean((matrix @ (a, b) - target) ** 2)))
    return Frontier(law, float(a), float(b), rmse)


MEASURES = ("proxy", "gold", "witness")


def frontier_report(looks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For evaluation.json, of the looks at a run: {"points": [{"step", "distance", "proxy", ...}], "laws": {measure: {...}}}.

    Distances are roots of the KL per reply, rewards are gains over the first look; {} below two looks.
    """
    if len(looks) < 2:
        return {}
    first, points = looks[0]["metrics"], []
    for look in looks:
        now = look["metrics"]
        gains = {name: now[name] - first[name] for name in MEASURES if name in now and name in first}
        # of replies that the policy drew: an estimate of something positive that need not be so itself
        points.append({"step": look["step"], "distance": math.sqrt(max(0.0, now["kl_sequence"])), **gains})
    laws = {}
    for name in MEASURES:
        known = [(point["distance"], point[name]) for point in points if name in point]
        if (law := fit_frontier([d for d, _ in known], [gain for _, gain in known], "rl")) is not None:
            laws[name] = {"a": law.a, "b": law.b, "rmse": law.rmse, "peak": law.peak}
    return {"points": points, "laws": laws}


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n to what it samples from, nats per reply: log n - (n - 1) / n, exact without ties (arXiv:2210.10760)."""
    if n < 1:
        raise ValueError(f"best-of-{n} picks from nothing. Take n of at least 1.")
    return math.log(n) - (n - 1) / n
