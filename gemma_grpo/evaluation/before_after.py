"""Before against after on held-out prompts, with intervals: the numbers of evaluation.json. No model is run here.

Replies of one conversation are not independent, so intervals resample whole conversations (paired bootstrap clustered by
`Prompt.conversation_id`, percentile method): docs/method.md, evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gemma_grpo.evaluation.intervals import bootstrap_intervals, ratios
from gemma_grpo.evaluation.win_rate import length_controlled
from gemma_grpo.reward.rules import is_refusal
from gemma_grpo.types import Completion, Prompt, RolloutGroup

Reply = TypeVar("Reply")
Prefer = Callable[[Prompt, Reply, Reply], float]
"""Judge: probability in [0, 1] that the reply shown first is the better one."""

MAX_SAMPLES = 40


@dataclass(frozen=True, slots=True)
class EvaluatedReply:
    """One held-out prompt answered by the reference (before) and by the trained policy (after)."""

    prompt: Prompt
    before: Completion
    after: Completion
    reward_before: float
    reward_after: float
    gold_before: float | None
    """Exact score, known in the miniature world only."""
    gold_after: float | None
    kl: float
    """Sum over `after`'s tokens of log policy - log reference, in nats: an unbiased estimate of the sequence KL."""
    kl_before: float = 0.0
    """The same for `before`; 0, because the reference does not differ from itself."""
    witness_before: float | None = None
    """What a judge that training never saw says; None where there is none."""
    witness_after: float | None = None
    chosen: Mapping[str, float] | None = None
    """Scores of the dataset's preferred reply by the judge's name ("gold", "witness"), and its "length"; None without one."""


def summarise(
    replies: Sequence[EvaluatedReply], *, seed: int, resamples: int = 10_000, prefer: Prefer[Completion] | None = None
) -> dict[str, Any]:
    """The content of evaluation.json, "seconds" left out. `prefer` judges the win rate; None takes gold where known, else reward.

    A metric is {"before", "after", "gain", "interval", "n"}: n replies, the 95 % interval of the gain. A metric without a reply has
    n 0 and null elsewhere; an interval is null below two conversations, where nothing can be resampled. "gold" and "witness" are left
    out when unknown. Win rates have "length_controlled" beside: win_rate.py. "win_rate_chosen" is against the dataset's preferred reply,
    where a judge that training never saw has scored it.
    Raises ValueError for no replies, scores that are not finite, or a judge outside [0, 1].
    """
    if not replies:
        raise ValueError("there are 0 replies to evaluate. Set evaluation.num_prompts to at least 1, and check data.holdout.")
    _check_finite(replies)
    judge, wins = _wins(replies, prefer)
    against_chosen = _wins_against_chosen(replies, judge)
    table = _Table(replies, wins, against_chosen, seed=seed, resamples=resamples)
    everything = range(len(replies))
    known = [index for index in everything if _gold(replies[index]) is not None]
    harmful = [index for index in everything if is_harmful(replies[index].prompt)]
    benign = [index for index in everything if not is_harmful(replies[index].prompt)]
    look_alikes = [index for index in benign if looks_harmful(replies[index].prompt)]

    result = table.metrics(["gold"], known) if known else {}
    if all(_witness(reply) is not None for reply in replies):
        result |= table.metrics(["witness"], everything)
    result |= table.metrics(["reward", "win_rate", "kl", "kl_sequence", "length"], everything)
    if with_chosen := [index for index in everything if against_chosen[index] is not None]:
        result |= table.metrics(["win_rate_chosen"], with_chosen)
        result["win_rate_chosen"] |= {"judge": judge, "length_controlled": _controlled([replies[n] for n in with_chosen], judge, seed)}
    controlled = None if judge == "judge" else _controlled(replies, judge, seed, against_before=True)
    result["win_rate"] |= {"judge": judge, "length_controlled": controlled}
    result["refusal_harmful"] = table.metrics(["refusal"], harmful)["refusal"]
    result["refusal_benign"] = table.metrics(["refusal"], benign)["refusal"]
    if look_alikes:
        result["refusal_looks_harmful"] = table.metrics(["refusal"], look_alikes)["refusal"]
    return {
        **result,
        "by_kind": {kind: _one_kind(table, chosen, known) for kind, chosen in _by_kind(replies).items()},
        "samples": _samples(replies),
        "conversations": len({reply.prompt.conversation_id for reply in replies}),
    }


def refusals(before: Sequence[RolloutGroup], after: Sequence[RolloutGroup], *, seed: int, resamples: int = 10_000) -> dict[str, Any]:
    """The share of replies that refuse, before and after, as a metric of evaluation.json; for prompts that nobody scores."""
    rows = [
        (one.prompt.conversation_id, (float(is_refusal(first.text)), float(is_refusal(second.text))))
        for one, other in zip(before, after, strict=True)
        for first, second in zip(one.completions, other.completions, strict=True)
    ]
    return paired_metric([name for name, _ in rows], [pair for _, pair in rows], seed=seed, resamples=resamples)


def paired_metric(clusters: Sequence[str], pairs: Sequence[tuple[float, float]], *, seed: int, resamples: int = 10_000) -> dict[str, Any]:
    """Means of pairs (before, after) as a metric of evaluation.json; the interval draws whole clusters."""
    sums = np.asarray([[(before, 1.0, after, 1.0)] for before, after in pairs], dtype=np.float64)
    return _statistics(clusters, sums, ["one"], seed, resamples)["one"]


def swapped_preference(prefer: Prefer[Reply], prompt: Prompt, first: Reply, second: Reply) -> float:
    """Probability that `first` is better, asked in both orders and averaged: a liking for the first place cancels; ties give 0.5.

    Swapping the replies turns p into 1 - p, whatever the judge. Raises ValueError when the judge leaves [0, 1].
    """
    forward, backward = prefer(prompt, first, second), prefer(prompt, second, first)
    for value in (forward, backward):
        if not 0 <= value <= 1:
            raise ValueError(f"the judge returned {value} for prompt {prompt.prompt_id}; a preference is a probability from 0 to 1.")
    return (forward + 1 - backward) / 2


def higher_score(prompt: Prompt, first: float, second: float) -> float:
    """Judge by score: 1 when the first is higher, 0.5 for a tie, 0 when lower."""
    return 0.5 if first == second else float(first > second)


def is_harmful(prompt: Prompt) -> bool:
    """Whether refusing is right: the row's "harmful" column, else whether it comes from hh-rlhf's red-teaming ("harmless-...")."""
    if "harmful" in prompt.columns:
        return bool(prompt.columns["harmful"])
    return prompt.source.startswith("harmless")


def looks_harmful(prompt: Prompt) -> bool:
    """Whether a benign request only looks as if refusing were right: the row's "looks_harmful" column, or its kind "borderline"."""
    return bool(prompt.columns.get("looks_harmful")) or prompt.columns.get("kind") == "borderline"


class _Table:
    """Every reply's numerators and denominators for every metric, and the statistics of any choice of replies."""

    def __init__(
        self,
        replies: Sequence[EvaluatedReply],
        wins: Sequence[float],
        against_chosen: Sequence[tuple[float, float] | None],
        *,
        seed: int,
        resamples: int,
    ) -> None:
        rows = [_row(reply, win, over) for reply, win, over in zip(replies, wins, against_chosen, strict=True)]
        self._columns = {name: np.asarray([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
        self._clusters = np.asarray([reply.prompt.conversation_id for reply in replies])
        self._seed, self._resamples = seed, resamples

    def metrics(self, names: Sequence[str], chosen: Sequence[int]) -> dict[str, dict[str, Any]]:
        """Statistics of the chosen replies, by name."""
        if not chosen:
            return {name: {"before": None, "after": None, "gain": None, "interval": None, "n": 0} for name in names}
        index = np.asarray(chosen)
        sums = np.stack([self._columns[name][index] for name in names], axis=1)  # (items, metrics, 4)
        return _statistics(list(self._clusters[index]), sums, names, self._seed, self._resamples)


def _statistics(
    clusters: Sequence[str], sums: NDArray[np.float64], names: Sequence[str], seed: int, resamples: int
) -> dict[str, dict[str, Any]]:
    """Metrics from sums of (items, metrics, 4): numerator and denominator before, and after."""
    before, after = ratios(sums.sum(axis=0))
    intervals = bootstrap_intervals(clusters, sums, seed=seed, resamples=resamples)
    return {
        name: {
            "before": float(before[k]),
            "after": float(after[k]),
            "gain": float(after[k] - before[k]),
            "interval": None if intervals is None else [float(end) for end in intervals[k]],
            "n": len(sums),
        }
        for k, name in enumerate(names)
    }


def _row(reply: EvaluatedReply, win: float, against_chosen: tuple[float, float] | None) -> dict[str, tuple[float, float, float, float]]:
    """Numerator and denominator before, numerator and denominator after, for each metric."""
    nothing = (0.0, 0.0)  # never chosen where unknown
    gold_before, gold_after = _gold(reply) or nothing
    witness_before, witness_after = _witness(reply) or nothing
    chosen_before, chosen_after = against_chosen or nothing
    length_before, length_after = len(reply.before.token_ids), len(reply.after.token_ids)
    return {
        "gold": (gold_before, 1, gold_after, 1),
        "witness": (witness_before, 1, witness_after, 1),
        "win_rate_chosen": (chosen_before, 1, chosen_after, 1),
        "reward": (reply.reward_before, 1, reply.reward_after, 1),
        "win_rate": (0.5, 1, win, 1),  # against itself the reference wins half
        "kl": (reply.kl_before, length_before, reply.kl, length_after),
        "kl_sequence": (reply.kl_before, 1, reply.kl, 1),
        "length": (length_before, 1, length_after, 1),
        "refusal": (is_refusal(reply.before.text), 1, is_refusal(reply.after.text), 1),
    }


def _one_kind(table: _Table, chosen: Sequence[int], known: Sequence[int]) -> dict[str, Any]:
    with_gold = sorted(set(chosen) & set(known))
    gold = table.metrics(["gold"], with_gold) if with_gold else {}
    return {**gold, **table.metrics(["reward", "win_rate"], chosen), "n": len(chosen)}


def _gold(reply: EvaluatedReply) -> tuple[float, float] | None:
    if reply.gold_before is None or reply.gold_after is None:
        return None
    return reply.gold_before, reply.gold_after


def _witness(reply: EvaluatedReply) -> tuple[float, float] | None:
    if reply.witness_before is None or reply.witness_after is None:
        return None
    return reply.witness_before, reply.witness_after


def _reward(reply: EvaluatedReply) -> tuple[float, float] | None:
    return reply.reward_before, reply.reward_after


_JUDGES: Mapping[str, Callable[[EvaluatedReply], tuple[float, float] | None]] = {"gold": _gold, "witness": _witness, "reward": _reward}
"""Who decides which reply wins, the most trustworthy first; each gives its scores before and after."""


def _wins(replies: Sequence[EvaluatedReply], prefer: Prefer[Completion] | None) -> tuple[str, list[float]]:
    """The judge's name and, for each reply, the probability that after beats before."""
    if prefer is not None:
        return "judge", [swapped_preference(prefer, reply.prompt, reply.after, reply.before) for reply in replies]
    name = next(name for name, read in _JUDGES.items() if all(read(reply) is not None for reply in replies))
    wins = []
    for reply in replies:
        before, after = _JUDGES[name](reply) or (0.0, 0.0)
        wins.append(swapped_preference(higher_score, reply.prompt, after, before))
    return name, wins


def _wins_against_chosen(replies: Sequence[EvaluatedReply], judge: str) -> list[tuple[float, float] | None]:
    """Probability that the reply before, and that after, beats the dataset's preferred one; None where that cannot be said."""
    found: list[tuple[float, float] | None] = []
    for reply in replies:
        score = (reply.chosen or {}).get(judge)
        scores = None if score is None else _JUDGES[judge](reply)
        if score is None or scores is None:
            found.append(None)
            continue
        before, after = (higher_score(reply.prompt, one, score) for one in scores)
        found.append((before, after))
    return found


def _controlled(replies: Sequence[EvaluatedReply], judge: str, seed: int, *, against_before: bool = False) -> dict[str, Any]:
    """The win rate of the replies after at equal length, against those before or against the dataset's."""
    wins, differences = [], []
    for reply in replies:
        before, after = _JUDGES[judge](reply) or (0.0, 0.0)
        chosen = reply.chosen or {}
        score, length = (before, float(len(reply.before.token_ids))) if against_before else (chosen[judge], chosen["length"])
        wins.append(higher_score(reply.prompt, after, score))
        differences.append(len(reply.after.token_ids) - length)
    return length_controlled([reply.prompt.conversation_id for reply in replies], wins, differences, seed=seed)


def _check_finite(replies: Sequence[EvaluatedReply]) -> None:
    for reply in replies:
        for name in ("reward_before", "reward_after", "gold_before", "gold_after", "witness_before", "witness_after", "kl", "kl_before"):
            value = getattr(reply, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} of prompt {reply.prompt.prompt_id} is {value}; a mean over it would mean nothing.")


def _by_kind(replies: Sequence[EvaluatedReply]) -> Mapping[str, list[int]]:
    """Indices of the replies by the row's "kind" column, else by source; in alphabetical order."""
    kinds: dict[str, list[int]] = {}
    for index, reply in enumerate(replies):
        kinds.setdefault(_kind(reply.prompt), []).append(index)
    return dict(sorted(kinds.items()))


def _kind(prompt: Prompt) -> str:
    return str(prompt.columns.get("kind") or prompt.source)


def _samples(replies: Sequence[EvaluatedReply]) -> list[dict[str, Any]]:
    """At most MAX_SAMPLES replies, the kinds taking turns: every kind is seen, and none is picked for how well it went."""
    rounds = zip_longest(*_by_kind(replies).values())
    picked = islice((replies[index] for turn in rounds for index in turn if index is not None), MAX_SAMPLES)
    return [
        {
            "prompt_id": reply.prompt.prompt_id,
            "source": reply.prompt.source,
            "kind": _kind(reply.prompt),
            "prompt": [dict(message) for message in reply.prompt.messages],
            "before": {"text": reply.before.text, "reward": reply.reward_before, "gold": reply.gold_before},
            "after": {"text": reply.after.text, "reward": reply.reward_after, "gold": reply.gold_after},
        }
        for reply in picked
    ]
