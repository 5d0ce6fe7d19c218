"""What a reward is, how several become one number, and what a reward may return.

Owns the Reward protocol, the weighted sum and the checks on every score. Rewards themselves: generative.py, rules.py, functions.py;
shaping them: shaping.py. Axes: N groups (prompts), G completions of each; None where a reward does not apply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real
from typing import Any, Protocol, TypeAlias

from gemma_grpo.stopping import check
from gemma_grpo.types import RolloutGroup

Scores: TypeAlias = "list[list[float | None]]"
"""[N][G]; None where a completion was not scored."""
Shape: TypeAlias = Callable[[Scores, Sequence[RolloutGroup]], Scores]


class RewardError(ValueError):
    """A reward that failed or returned what no trainer can use; the message names the reward."""


class Reward(Protocol):
    """Scores completions. Higher is better; the scale is the reward's own."""

    @property
    def name(self) -> str:
        """What metrics and samples call it."""
        ...

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        """One number per completion, [N][G]; None where the reward does not apply."""
        ...


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """A reward as a part of a sum."""

    reward: Reward
    weight: float = 1.0
    shape: Shape | None = None
    """Applied to the raw scores before weighting; None takes them as they are."""


@dataclass(frozen=True, slots=True)
class StackScores:
    """What a stack of rewards says about N groups."""

    rewards: Scores
    """Weighted sum of the shaped parts that scored the completion; None where none did."""
    parts: Mapping[str, Scores]
    """Each reward's raw scores, before shaping and weighting."""


class RewardStack:
    """Several rewards as one: shape each, weight it, add up.

    Raises ValueError for no part, two parts of one name, or a weight that is not finite.
    """

    def __init__(self, parts: Sequence[WeightedReward]) -> None:
        names = [part.reward.name for part in parts]
        if not parts:
            raise ValueError("the reward has no parts: nothing would be learned. Name at least one reward.")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two rewards are named {twice!r}; their metrics would be one. Give each its own name.")
        for part in parts:
            if not math.isfinite(part.weight):
                raise ValueError(f"the weight of reward {part.reward.name!r} is {part.weight}. Give a finite number.")
        self.parts = tuple(parts)

    @property
    def weights(self) -> dict[str, float]:
        """Reward name -> weight."""
        return {part.reward.name: part.weight for part in self.parts}

    def score(self, groups: Sequence[RolloutGroup]) -> StackScores:
        """Rewards of all completions. Raises RewardError naming the reward that failed or returned something unusable."""
        totals: Scores = [[None] * len(group.completions) for group in groups]
        raw: dict[str, Scores] = {}
        for part in self.parts:
            check()
            name = part.reward.name
            raw[name] = validate_scores(part.reward.score(groups), groups, name)
            shaped = validate_scores(part.shape(raw[name], groups), groups, f"{name} (shaped)") if part.shape else raw[name]
            totals = [_added(row, values, part.weight) for row, values in zip(totals, shaped, strict=True)]
        return StackScores(totals, raw)


def validate_scores(scores: Any, groups: Sequence[RolloutGroup], name: str) -> Scores:
    """The scores as [N][G] Python floats. Raises RewardError naming the reward, the index and the value of the first fault."""
    rows = _as_list(scores, name)
    if len(rows) != len(groups):
        raise RewardError(f"reward {name!r} returned {len(rows)} groups of scores for {len(groups)} groups. Return one list per group.")
    checked: Scores = []
    for n, (row, group) in enumerate(zip(rows, groups, strict=True)):
        values = _as_list(row, name)
        if len(values) != len(group.completions):
            raise RewardError(
                f"reward {name!r} returned {len(values)} scores for the {len(group.completions)} completions of group {n}. "
                "Return one score per completion."
            )
        checked.append([_number(value, name, f"group {n}, completion {g}") for g, value in enumerate(values)])
    return checked


def validate_flat(scores: Any, count: int, name: str) -> list[float | None]:
    """A flat list of scores as Python floats, one per completion. Raises RewardError like validate_scores."""
    values = _as_list(scores, name)
    if len(values) != count:
        raise RewardError(f"reward {name!r} returned {len(values)} scores for {count} completions. Return one score per completion.")
    return [_number(value, name, f"index {index}") for index, value in enumerate(values)]


def unknown_reward(name: str, known: Iterable[str]) -> ValueError:
    """The error for a reward name nobody knows, with the nearest one that exists."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown reward {name!r}. {hint}Known are {', '.join(names)}.")


def _added(totals: Sequence[float | None], values: Sequence[float | None], weight: float) -> list[float | None]:
    return [
        total if value is None else weight * value + (total or 0.0)  # None + value: the first part that scores it
        for total, value in zip(totals, values, strict=True)
    ]


def _as_list(scores: Any, name: str) -> list[Any]:
    if isinstance(scores, (list, tuple)):
        return list(scores)
    if getattr(scores, "ndim", 0) and hasattr(scores, "tolist"):  # numpy arrays, torch tensors
        listed = scores.tolist()
        assert isinstance(listed, list)
        return listed
    raise RewardError(f"reward {name!r} returned {_shown(scores)}. Return a list with one number or None per completion.")


def _number(value: Any, name: str, where: str) -> float | None:
    if value is None:
        return None
    plain = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
    if isinstance(plain, bool) or not isinstance(plain, Real):
        raise RewardError(f"reward {name!r} returned {_shown(value)} at {where}. Return a number, or None for not scored.")
    try:
        number = float(plain)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(f"reward {name!r} returned {number} at {where}. Return a finite number, or None for not scored.")
    return number


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:  # whatever a stranger's __repr__ does must not hide the real message
        text = f"unprintable: {type(error).__name__}"
    return f"{text[:60]} ({type(value).__name__})"
