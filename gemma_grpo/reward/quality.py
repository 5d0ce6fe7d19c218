"""How good a pair scorer is, on pairs it never saw: what calibration.json holds. Scores in, numbers out; no model.

Accuracy alone flatters: a rule as blunt as "the longer reply wins" is right in 44 to 60 % of real pairs, so it stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gemma_grpo.types import PreferencePair

BINS = 5


def wilson_interval(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); (0, 1) when n is 0. Ties may count as half a success."""
    if n == 0:
        return 0.0, 1.0
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy(margins: Float[Tensor, " N"]) -> dict[str, Any]:
    """Share of positive margins, ties half, with its interval and n."""
    n = len(margins)
    right = float((margins > 0).sum() + 0.5 * (margins == 0).sum())
    return {"value": right / n if n else None, "interval": list(wilson_interval(right, n)), "n": n}


def quality_report(pairs: Sequence[PreferencePair], scores: Float[Tensor, "N 2"], zero_shot: Float[Tensor, "N 2"]) -> dict[str, Any]:
    """Everything calibration.json says about held-out pairs; columns of `scores` are chosen, rejected."""
    margins = scores[:, 0] - scores[:, 1]
    lengths = torch.tensor([[len(pair.chosen.split()), len(pair.rejected.split())] for pair in pairs]).reshape(-1, 2)
    difference = (lengths[:, 0] - lengths[:, 1]).float()
    closest = difference.abs().argsort(stable=True)[: math.ceil(len(pairs) / 4)]
    bins, error = calibration(margins)
    return {
        "pairs_held_out": len(pairs),
        "accuracy": accuracy(margins),
        "accuracy_zero_shot": accuracy(zero_shot[:, 0] - zero_shot[:, 1]),
        "longer_wins": accuracy(difference),
        "closest_length_quarter": accuracy(margins[closest]),
        "by_source": _by(pairs, margins, lambda pair: pair.source),
        "by_kind": _by(pairs, margins, lambda pair: str(pair.columns["kind"])) if _has_kinds(pairs) else {},
        "calibration": bins,
        "expected_calibration_error": error,
    }


def calibration(margins: Float[Tensor, " N"]) -> tuple[list[dict[str, float]], float | None]:
    """Bins of stated against observed agreement, and their mean gap (expected calibration error, arXiv:1706.04599).

    Stated: sigmoid(|margin|), the probability the scorer gives to the side it prefers. Observed: how often people preferred it.
    """
    stated, agreed = margins.abs().sigmoid(), (margins > 0).float() + 0.5 * (margins == 0).float()
    bin_of = ((stated - 0.5) * 2 * BINS).long().clamp(0, BINS - 1)
    bins, error = [], 0.0
    for index in range(BINS):
        inside: Bool[Tensor, " N"] = bin_of == index
        if n := int(inside.sum()):
            predicted, observed = float(stated[inside].mean()), float(agreed[inside].mean())
            bins.append({"predicted": predicted, "observed": observed, "n": n})
            error += n / len(margins) * abs(predicted - observed)
    return bins, error if len(margins) else None


def _has_kinds(pairs: Sequence[PreferencePair]) -> bool:
    return bool(pairs) and all("kind" in pair.columns for pair in pairs)


def _by(pairs: Sequence[PreferencePair], margins: Tensor, key: Callable[[PreferencePair], str]) -> dict[str, Any]:
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(key(pair), []).append(index)
    return {name: accuracy(margins[rows]) for name, rows in sorted(groups.items())}
