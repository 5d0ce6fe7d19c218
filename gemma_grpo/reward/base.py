"""What a reward is, how several become one number, and what a reward may return.

Owns the Reward protocol, the weighted sum and the checks on every score. Rewards themselves: generative.py, rules.py, functions.py;
shaping them: shaping.py. Axes: N groups (prompts), G completions of each; None where a reward does not apply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Real
from typing import Any, Protocol, TypeAlias, runtime_checkable

from gemma_grpo import distributed
from gemma_grpo.stopping import check
from gemma_grpo.types import RolloutGroup

Scores: TypeAlias = "list[list[float | None]]"
"""[N][G]; None where a completion was not scored."""
Shape: TypeAlias = Callable[[Scores, Sequence[RolloutGroup]], Scores]
FLOAT32_END = 2.0**128 - 2.0**103
"""From here on a number rounds to infinity in float32, which is what rewards are learned from in."""


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
class Fault:
    """What is wrong with some of a reward's scores, or with a whole call."""

    cause: str
    """In two or three words, for counting: "returned nan"."""
    text: str
    """What, where: a sentence that begins after the reward's name, without its full stop."""
    remedy: str
    completions: int
    """How many go without a score for it."""
    whole: bool = False
    """The call as such failed, so that it says nothing about the single completions."""
    error: BaseException | None = field(default=None, compare=False)
    """What was raised, where it was raised in this process."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """Completions without a score because the reward failed there, not because it does not apply."""

    completions: int
    warning: str | None
    """What to say of them, causes and the last fault; None when there are none."""


@runtime_checkable
class SkippingReward(Reward, Protocol):
    """A reward that may leave out completions it fails on."""

    def score_or_skip(self, groups: Sequence[RolloutGroup]) -> tuple[Scores, Skipped | None]:
        """Scores, and what was skipped; None where failures stop the run."""
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
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Reward -> completions it failed on and was allowed to skip; only rewards that may skip."""
    warnings: tuple[str, ...] = ()
    """One sentence or two for each reward that skipped any."""


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
        skips: dict[str, Skipped] = {}
        for part in self.parts:
            check()
            name, reward = part.reward.name, part.reward
            scores, skipped = _shared_out(reward, groups) if isinstance(reward, SkippingReward) else (reward.score(groups), None)
            if skipped is not None:
                skips[name] = skipped
            raw[name] = validate_scores(scores, groups, name)
            shaped = validate_scores(part.shape(raw[name], groups), groups, f"{name} (shaped)") if part.shape else raw[name]
            totals = [_added(row, values, part.weight) for row, values in zip(totals, shaped, strict=True)]
        _check_totals(totals, self.weights)
        warnings = tuple(one.warning for one in skips.values() if one.warning is not None)
        return StackScores(totals, raw, {name: one.completions for name, one in skips.items()}, warnings)


def _shared_out(reward: SkippingReward, groups: Sequence[RolloutGroup]) -> tuple[Scores, Skipped | None]:
    """A user's function is asked once for each completion, by the rank whose share it is."""
    doing = f"reward {reward.name}"
    own = distributed.share([float(len(group.completions)) for group in groups])
    if distributed.world() == 1:
        return reward.score_or_skip(groups)
    with distributed.together(doing):
        scores, skipped = reward.score_or_skip([groups[n] for n in own]) if own else ([], None)
        told = None if skipped is None else [skipped.completions, skipped.warning]
        said = {"own": own, "scores": validate_scores(scores, [groups[n] for n in own], reward.name), "skipped": told}
    found = distributed.gather(said, doing)
    by_group = {n: row for one in found for n, row in zip(one["own"], one["scores"], strict=True)}
    counts = [one["skipped"] for one in found if one["skipped"] is not None]
    warning = next((text for _, text in counts if text is not None), None)
    return [by_group[n] for n in range(len(groups))], Skipped(sum(count for count, _ in counts), warning) if counts else None


def validate_scores(scores: Any, groups: Sequence[RolloutGroup], name: str) -> Scores:
    """The scores as [N][G] Python floats. Raises RewardError naming the reward, the index and the value of the first fault."""
    rows = _listed(scores, name)
    if len(rows) != len(groups):
        raise RewardError(f"reward {name!r} returned {len(rows)} groups of scores for {len(groups)} groups. Return one list per group.")
    checked: Scores = []
    for n, (row, group) in enumerate(zip(rows, groups, strict=True)):
        values = _listed(row, name)
        if len(values) != len(group.completions):
            raise RewardError(
                f"reward {name!r} returned {len(values)} scores for the {len(group.completions)} completions of group {n}. "
                "Return one score per completion."
            )
        checked.append([])
        for g, value in enumerate(values):
            try:
                checked[n].append(_number(value))
            except _UnusableError as fault:
                raise RewardError(f"reward {name!r} returned {fault} at group {n}, completion {g}. {fault.remedy}") from None
    return checked


def check_flat(scores: Any, groups: Sequence[RolloutGroup]) -> tuple[list[float | None], list[Fault]]:
    """A flat list of scores as Python floats, one per completion, None where it cannot be used; and what is wrong with it."""
    prompts = [group.prompt.prompt_id for group in groups for _ in group.completions]
    values = _as_list(scores)
    count, nothing = len(prompts), [None] * len(prompts)
    if values is None:
        text, remedy = f"returned {_shown(scores)}", "Return a list with one number or None per completion."
        return list(nothing), [Fault(f"returned a {type(scores).__name__}", text, remedy, count, whole=True)]
    if len(values) != count:
        text, remedy = f"returned {len(values)} scores for {count} completions", "Return one score per completion."
        return list(nothing), [Fault("returned a wrong number of scores", text, remedy, count, whole=True)]
    checked: list[float | None] = []
    unusable: dict[str, tuple[_UnusableError, list[int]]] = {}
    for index, value in enumerate(values):
        try:
            checked.append(_number(value))
        except _UnusableError as fault:
            checked.append(None)
            unusable.setdefault(str(fault), (fault, []))[1].append(index)
    return checked, [_fault_of_values(fault, indices, prompts) for fault, indices in unusable.values()]


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


def _check_totals(totals: Scores, weights: Mapping[str, float]) -> None:
    for n, row in enumerate(totals):
        for g, total in enumerate(row):
            if total is not None and not abs(total) < FLOAT32_END:
                parts = ", ".join(f"{name} x {weight:g}" for name, weight in weights.items())
                raise RewardError(
                    f"the rewards of group {n}, completion {g} add up to {total:g}, which is not finite in float32 ({parts}). "
                    "Lower the weights, or scale the rewards down."
                )


class _UnusableError(ValueError):
    """A value that is no score; the message shows it."""

    def __init__(self, shown: str, remedy: str, cause: str) -> None:
        super().__init__(shown)
        self.remedy, self.cause = f"{remedy}, or None for not scored.", cause


def _fault_of_values(fault: _UnusableError, indices: Sequence[int], prompts: Sequence[str]) -> Fault:
    first, which = indices[0], "index" if len(indices) == 1 else "first index"
    where = f"{len(indices)} of {len(prompts)} completions ({which} {first}, prompt {prompts[first]})"
    return Fault(f"returned {fault.cause}", f"returned {fault} for {where}", fault.remedy, len(indices))


def _as_list(scores: Any) -> list[Any] | None:
    """None for what is no list, tuple or array."""
    if isinstance(scores, (list, tuple)):
        return list(scores)
    if getattr(scores, "ndim", 0) and hasattr(scores, "tolist"):  # numpy arrays, torch tensors
        listed = scores.tolist()
        return listed if isinstance(listed, list) else None
    return None


def _listed(scores: Any, name: str) -> list[Any]:
    values = _as_list(scores)
    if values is None:
        raise RewardError(f"reward {name!r} returned {_shown(scores)}. Return a list with one number or None per completion.")
    return values


def _number(value: Any) -> float | None:
    if value is None:
        return None
    plain = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
    if isinstance(plain, bool) or not isinstance(plain, Real):
        raise _UnusableError(_shown(value), "Return a number", f"a {type(value).__name__}")
    try:
        number = float(plain)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _UnusableError(str(number), "Return a finite number", str(number))
    if not abs(number) < FLOAT32_END:
        raise _UnusableError(f"{number}, which is infinite in float32,", "Return a number below 3.4e38", "what is infinite in float32")
    return number


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:  # whatever a stranger's __repr__ does must not hide the real message
        text = f"unprintable: {type(error).__name__}"
    return f"{text[:60]} ({type(value).__name__})"
