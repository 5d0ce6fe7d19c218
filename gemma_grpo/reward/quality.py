"""How good a pair scorer is, on pairs it never saw: what calibration.json holds. Scores in, numbers out; no model.

Accuracy alone flatters: a rule as blunt as "the longer reply wins" is right in 44 to 60 % of real pairs, so it stands beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool, Float
from scipy.stats import spearmanr
from torch import Tensor

from gemma_grpo.data.prompts import conversation_id
from gemma_grpo.reward.base import Scores
from gemma_grpo.shares import wilson_interval
from gemma_grpo.types import PreferencePair, RolloutGroup

BINS = 5
SUSPICIOUS = 0.76
"""Accuracy from which leaks are looked for: raters who agree on 63 % of pairs let a perfect judge be right on 75.5 % (p^2 + (1 - p)^2)."""


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
        "by_depth": _by(pairs, margins, _depth),
        "without_sibling": accuracy(margins[_alone(pairs)]),
        "length_correlation": spearman(margins.tolist(), difference.tolist()),
        "calibration": bins,
        "expected_calibration_error": error,
    }


def agreement(members: Iterable[Sequence[Sequence[float | None]]]) -> dict[str, Any]:
    """Share of the pairs scored by several members, [N][2] scores of each, on which all of these prefer the same reply."""
    same = n = 0
    for rows in zip(*members, strict=True):
        sides = [chosen > rejected for chosen, rejected in rows if chosen is not None and rejected is not None]
        n += len(sides) > 1
        same += len(sides) > 1 and len(set(sides)) == 1
    return {"value": same / n if n else None, "interval": list(wilson_interval(float(same), n)), "n": n}


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Rank correlation; None where either is constant, or below three values."""
    if len(one) < 3 or len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return float(spearmanr(one, other).statistic)


def within_group_length_correlation(groups: Sequence[RolloutGroup], scores: Scores) -> dict[str, Any]:
    """By source, the mean over groups of the rank correlation of reward and length in tokens: what a policy could gain by length alone."""
    found: dict[str, list[float]] = {}
    for group, row in zip(groups, scores, strict=True):
        pairs = [(value, len(one.token_ids)) for value, one in zip(row, group.completions, strict=True) if value is not None]
        if (value := spearman([score for score, _ in pairs], [float(length) for _, length in pairs])) is not None:
            found.setdefault(group.prompt.source, []).append(value)
    return {source: {"value": fmean(values), "n": len(values)} for source, values in sorted(found.items())}


def leakage(train: Sequence[PreferencePair], held_out: Sequence[PreferencePair]) -> dict[str, Any]:
    """How much of the held-out pairs training saw: conversations on both sides, and replies that a training row's context goes on with.

    In hh-rlhf a deeper row continues one of the replies of a shallower one, and which one gives its label away (ALGORITHM: by conversation,
    never by row).
    """
    conversations = {conversation_id(pair.messages) for pair in train}
    continued = {message["content"].strip() for pair in train for message in pair.messages if message["role"] == "assistant"}
    shared = sum(conversation_id(pair.messages) in conversations for pair in held_out)
    told = sum(bool({pair.chosen.strip(), pair.rejected.strip()} & continued) for pair in held_out)
    return {"n": len(held_out), "conversations_in_training": shared, "replies_in_training_contexts": told}


def leakage_warning(report: Mapping[str, Any]) -> str | None:
    """What to say of an accuracy that is higher than people agree with each other; None where nothing is to be said."""
    found, value = report.get("leakage"), (report.get("accuracy") or {}).get("value")
    if not found or value is None or not (found["conversations_in_training"] or found["replies_in_training_contexts"]):
        return None
    return (
        f"the reward adapter is right on {value:.1%} of held-out pairs, more than two people agree ({SUSPICIOUS:.0%}). Of these pairs "
        f"{found['conversations_in_training']} are of conversations it was trained on, and of {found['replies_in_training_contexts']} "
        "a training row goes on with a reply: labels leak. Split the data by conversation."
    )


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


def _depth(pair: PreferencePair) -> str:
    """Turns of the person: "1", "2", "3" or "4+"."""
    turns = sum(message["role"] == "user" for message in pair.messages)
    return str(turns) if turns < 4 else "4+"


def _alone(pairs: Sequence[PreferencePair]) -> list[int]:
    """Places of the pairs whose conversation no other of them is of."""
    names = [conversation_id(pair.messages) for pair in pairs]
    counts = Counter(names)
    return [n for n, name in enumerate(names) if counts[name] == 1]


def _has_kinds(pairs: Sequence[PreferencePair]) -> bool:
    return bool(pairs) and all("kind" in pair.columns for pair in pairs)


def _by(pairs: Sequence[PreferencePair], margins: Tensor, key: Callable[[PreferencePair], str]) -> dict[str, Any]:
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(key(pair), []).append(index)
    return {name: accuracy(margins[rows]) for name, rows in sorted(groups.items())}
