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

from gemma_grpo.reward.rules import is_refusal
from gemma_grpo.types import Completion, Prompt

Reply = TypeVar("Reply")
Prefer = Callable[[Prompt, Reply, Reply], float]
"""Judge: probability in [0, 1] that the reply shown first is the better one."""

MAX_SAMPLES = 40
_CHUNK = 1000
"""Bootstrap draws at a time: memory is chunk x conversations numbers."""


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


def summarise(
    replies: Sequence[EvaluatedReply], *, seed: int, resamples: int = 10_000, prefer: Prefer[Completion] | None = None
) -> dict[str, Any]:
    """The content of evaluation.json, "seconds" left out. `prefer` judges the win rate; None takes gold where known, else reward.

    A metric is {"before", "after", "gain", "interval", "n"}: n replies, the 95 % interval of the gain. A metric without a reply has
    n 0 and null elsewhere; an interval is null below two conversations, where nothing can be resampled. "gold" is left out when
    unknown. Raises ValueError for no replies, scores that are not finite, or a judge outside [0, 1].
    """
    if not replies:
        raise ValueError("there are 0 replies to evaluate. Set evaluation.num_prompts to at least 1, and check data.holdout.")
    _check_finite(replies)
    judge, wins = _wins(replies, prefer)
    table = _Table(replies, wins, seed=seed, resamples=resamples)
    everything = range(len(replies))
    known = [index for index in everything if _gold(replies[index]) is not None]
    harmful = [index for index in everything if is_harmful(replies[index].prompt)]
    benign = [index for index in everything if not is_harmful(replies[index].prompt)]

    result = table.metrics(["gold"], known) if known else {}
    result |= table.metrics(["reward", "win_rate", "kl", "kl_sequence", "length"], everything)
    result["win_rate"]["judge"] = judge
    result["refusal_harmful"] = table.metrics(["refusal"], harmful)["refusal"]
    result["refusal_benign"] = table.metrics(["refusal"], benign)["refusal"]
    return {
        **result,
        "by_kind": {kind: _one_kind(table, chosen, known) for kind, chosen in _by_kind(replies).items()},
        "samples": _samples(replies),
        "conversations": len({reply.prompt.conversation_id for reply in replies}),
    }


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


def bootstrap_intervals(
    clusters: Sequence[str], sums: NDArray[np.float64], *, seed: int, resamples: int = 10_000
) -> NDArray[np.float64] | None:
    """95 % percentile intervals, [metrics, 2], of after - before, when whole clusters are drawn with replacement.

    `sums` is [items, metrics, 4]: before and after are ratios of sums, and the last axis is numerator and denominator before,
    numerator and denominator after. None below two clusters. All metrics see the same draws.
    """
    names, owner = np.unique(np.asarray(clusters), return_inverse=True)
    if len(names) < 2:
        return None
    totals = np.zeros((len(names), *sums.shape[1:]))
    np.add.at(totals, owner, sums)
    rng = np.random.default_rng(seed)
    gains = []
    for start in range(0, resamples, _CHUNK):
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=min(_CHUNK, resamples - start))
        before, after = _ratios(np.tensordot(counts.astype(np.float64), totals, axes=1))  # (draws, metrics, 4)
        gains.append(after - before)
    return np.percentile(np.concatenate(gains), [2.5, 97.5], axis=0).T


class _Table:
    """Every reply's numerators and denominators for every metric, and the statistics of any choice of replies."""

    def __init__(self, replies: Sequence[EvaluatedReply], wins: Sequence[float], *, seed: int, resamples: int) -> None:
        rows = [_row(reply, win) for reply, win in zip(replies, wins, strict=True)]
        self._columns = {name: np.asarray([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
        self._clusters = np.asarray([reply.prompt.conversation_id for reply in replies])
        self._seed, self._resamples = seed, resamples

    def metrics(self, names: Sequence[str], chosen: Sequence[int]) -> dict[str, dict[str, Any]]:
        """Statistics of the chosen replies, by name."""
        if not chosen:
            return {name: {"before": None, "after": None, "gain": None, "interval": None, "n": 0} for name in names}
        index = np.asarray(chosen)
        sums = np.stack([self._columns[name][index] for name in names], axis=1)  # (items, metrics, 4)
        before, after = _ratios(sums.sum(axis=0))
        intervals = bootstrap_intervals(list(self._clusters[index]), sums, seed=self._seed, resamples=self._resamples)
        return {
            name: {
                "before": float(before[k]),
                "after": float(after[k]),
                "gain": float(after[k] - before[k]),
                "interval": None if intervals is None else [float(end) for end in intervals[k]],
                "n": len(chosen),
            }
            for k, name in enumerate(names)
        }


def _row(reply: EvaluatedReply, win: float) -> dict[str, tuple[float, float, float, float]]:
    """Numerator and denominator before, numerator and denominator after, for each metric."""
    gold_before, gold_after = _gold(reply) or (0.0, 0.0)  # never chosen where unknown
    length_before, length_after = len(reply.before.token_ids), len(reply.after.token_ids)
    return {
        "gold": (gold_before, 1, gold_after, 1),
        "reward": (reply.reward_before, 1, reply.reward_after, 1),
        "win_rate": (0.5, 1, win, 1),  # against itself the reference wins half
        "kl": (reply.kl_before, length_before, reply.kl, length_after),
        "kl_sequence": (reply.kl_before, 1, reply.kl, 1),
        "length": (length_before, 1, length_after, 1),
        "refusal": (is_refusal(reply.before.text), 1, is_refusal(reply.after.text), 1),
    }


def _ratios(sums: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    # a denominator of 0 (replies without a single token) has numerator 0 too
    before, after = (sums[..., k] / np.maximum(sums[..., k + 1], 1) for k in (0, 2))
    return before, after


def _one_kind(table: _Table, chosen: Sequence[int], known: Sequence[int]) -> dict[str, Any]:
    with_gold = sorted(set(chosen) & set(known))
    gold = table.metrics(["gold"], with_gold) if with_gold else {}
    return {**gold, **table.metrics(["reward", "win_rate"], chosen), "n": len(chosen)}


def _gold(reply: EvaluatedReply) -> tuple[float, float] | None:
    if reply.gold_before is None or reply.gold_after is None:
        return None
    return reply.gold_before, reply.gold_after


def _wins(replies: Sequence[EvaluatedReply], prefer: Prefer[Completion] | None) -> tuple[str, list[float]]:
    """The judge's name and, for each reply, the probability that after beats before."""
    if prefer is not None:
        return "judge", [swapped_preference(prefer, reply.prompt, reply.after, reply.before) for reply in replies]
    golds = [_gold(reply) for reply in replies]
    rewards = [(reply.reward_before, reply.reward_after) for reply in replies]
    known = [gold for gold in golds if gold is not None]
    name, scores = ("gold", known) if len(known) == len(replies) else ("reward", rewards)
    wins = [swapped_preference(higher_score, reply.prompt, after, before) for reply, (before, after) in zip(replies, scores, strict=True)]
    return name, wins


def _check_finite(replies: Sequence[EvaluatedReply]) -> None:
    for reply in replies:
        for name in ("reward_before", "reward_after", "gold_before", "gold_after", "kl", "kl_before"):
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
