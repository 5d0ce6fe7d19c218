"""Several trained judges as one: who scores which prompt, how their verdicts are combined, and what length is taken out of them.

Owns the members of an ensemble and the arithmetic. Training them is training.py's, the order of it all grpo/judges.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor

from gemma_grpo.config.schema import RewardModelSettings
from gemma_grpo.data.prompts import EncodedPair, part_of_conversation
from gemma_grpo.reward.base import Reward, Scores
from gemma_grpo.types import RolloutGroup

Combine = Callable[[Float[Tensor, "E B"], float], Float[Tensor, " B"]]


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter of an ensemble."""

    adapter: str
    """Its name in the model, and of its folder; the first one's folder is the run's reward folder itself."""
    number: int
    """Counts from 0 among the members that score the same prompts."""
    source: str | None
    """The only source it learns from and scores; None for all."""
    dpo_beta: float | None = None
    """Of a member that is trained as DPO trains, whose verdict is its implicit reward; None for a judge of the question."""


def members_of(settings: RewardModelSettings, sources: Sequence[str]) -> list[Member]:
    """The adapters a run trains, the first one named "reward": `members` judges for each source, or for all together, then DPO's."""
    routes: Sequence[str | None] = sorted(set(sources)) if settings.per_source and sources else [None]
    kinds = [None] * settings.members + [settings.dpo_beta] * settings.implicit_member
    found = [(number, source, beta) for source in routes for number, beta in enumerate(kinds)]
    return [Member("reward" if n == 0 else f"reward-{n + 1}", *one) for n, one in enumerate(found)]


def pairs_of(member: Member, pairs: Sequence[EncodedPair], members: int) -> list[EncodedPair]:
    """What a member learns from: its source's pairs, but for one of as many parts of the conversations as there are members.

    So that members differ by more than their order; two of them have a half each. A DPO member differs anyway and learns from all.
    """
    own = [pair for pair in pairs if member.source in (None, pair.pair.source)]
    return [pair for pair in own if members == 1 or part_of_conversation(pair.conversation_id, members) != member.number]


def uncertainty_weighted(scores: Float[Tensor, "E B"], uncertainty: float) -> Float[Tensor, " B"]:
    """UWO: mean over members minus `uncertainty` times their variance (arXiv:2310.02743)."""
    return scores.mean(0) - uncertainty * scores.var(0, correction=0)


def worst_case(scores: Float[Tensor, "E B"], _: float) -> Float[Tensor, " B"]:
    """WCO: the lowest member's score (arXiv:2310.02743)."""
    return scores.min(0).values


COMBINATIONS: Mapping[str, Combine] = {"uwo": uncertainty_weighted, "worst": worst_case}


def length_slope(margins: Sequence[float], differences: Sequence[float]) -> float:
    """Reward per further token: least squares of the margins of pairs over their differences of length, through the origin; 0 if unknown.

    Subtracting it times the length leaves margins that no linear function of length explains.
    """
    squares = sum(difference * difference for difference in differences)
    return sum(m * d for m, d in zip(margins, differences, strict=True)) / squares if squares else 0.0


def levels_of(by_member: Mapping[Member, Scores]) -> dict[str, float]:
    """By DPO member, the mean by which it lies above the judges on the same completions; they are comparable once it is taken off.

    DPO's loss sees differences within a pair alone, so the level of its reward is nobody's choice; a judge's is held around 0.
    """
    levels = {}
    for member, scores in by_member.items():
        if member.dpo_beta is None:
            continue
        judges = [rows for other, rows in by_member.items() if other.dpo_beta is None and other.source == member.source]
        gaps = [
            own - fmean(others)
            for n, row in enumerate(scores)
            for g, own in enumerate(row)
            if own is not None and (others := [value for rows in judges if (value := rows[n][g]) is not None])
        ]
        levels[member.adapter] = fmean(gaps) if gaps else 0.0
    return levels


class EnsembleReward:
    """The members' verdicts as one reward, named "generative"."""

    name = "generative"

    def __init__(
        self,
        judges: Mapping[Member, Reward],
        settings: RewardModelSettings,
        slopes: Mapping[str, float] | None = None,
        levels: Mapping[str, float] | None = None,
    ) -> None:
        """`slopes`: by source, what a token adds; `levels`: by adapter, what its verdicts lie above the others' (see `levels_of`)."""
        self.judges, self.slopes, self.levels = judges, slopes or {}, levels or {}
        self.combine, self.uncertainty = COMBINATIONS[settings.combine], settings.uncertainty

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        """One number per completion: combined, and without what its length adds where slopes are known."""
        return self.combined(self.by_member(groups), groups)

    def by_member(self, groups: Sequence[RolloutGroup]) -> dict[Member, Scores]:
        """Each member's own verdicts, None on prompts that are not its to score. A source that none learned from is scored by all."""
        known = {member.source for member in self.judges}
        found: dict[Member, Scores] = {}
        for member, judge in self.judges.items():
            own = [n for n, group in enumerate(groups) if member.source in (None, group.prompt.source) or group.prompt.source not in known]
            rows: Scores = [[None] * len(group.completions) for group in groups]
            for n, row in zip(own, judge.score([groups[n] for n in own]) if own else [], strict=True):
                rows[n] = row
            found[member] = rows
        return found

    def combined(self, by_member: Mapping[Member, Scores], groups: Sequence[RolloutGroup]) -> Scores:
        """The members' verdicts as one number per completion."""
        result: Scores = []
        for n, group in enumerate(groups):
            own = {member: scores[n] for member, scores in by_member.items() if None not in scores[n]}
            rows = list(own.values())
            level = torch.tensor([self.levels.get(member.adapter, 0.0) for member in own])
            values = torch.tensor(rows, dtype=torch.float32) - level[:, None] if rows else torch.zeros(0)
            slope = self.slopes.get(group.prompt.source, 0.0)
            lengths = torch.tensor([len(completion.token_ids) for completion in group.completions])
            nothing: list[float | None] = [None] * len(lengths)
            result.append((self.combine(values, self.uncertainty) - slope * lengths).tolist() if rows else nothing)
        return result
