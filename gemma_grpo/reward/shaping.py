"""PAR: a raw reward measured against a reference reply and bounded, so that an outlier cannot buy the whole update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from gemma_grpo.reward.base import Reward, RewardError, Scores, Shape
from gemma_grpo.types import Completion, RolloutGroup

References = Callable[[Sequence[RolloutGroup]], Sequence[float]]


def par(references: References) -> Shape:
    """sigmoid(r - r_ref), where `references` gives one r_ref per group: the probability to beat the reference (arXiv:2502.18770).

    Steep around the reference and flat far above it. Adding a constant to r and r_ref alike changes nothing.
    """

    def shape(values: Scores, groups: Sequence[RolloutGroup]) -> Scores:
        centres = references(groups)
        if len(centres) != len(values):
            raise RewardError(f"PAR shaping got {len(centres)} references for {len(values)} groups. Give one per group.")
        return [[None if value is None else _sigmoid(value - centre) for value in row] for row, centre in zip(values, centres, strict=True)]

    return shape


class ReferenceRewards:
    """A reward, and one reference reward per group: of the dataset's preferred reply where the prompt has one (column "chosen").

    The reply is scored beside the group's completions, as one more of them: their prompt is computed once. Elsewhere the reference is
    `mean`, the reward of the reference policy's samples.
    """

    def __init__(self, reward: Reward, encode_reply: Callable[[str], Sequence[int]], mean: float) -> None:
        self.reward, self.encode_reply, self.mean = reward, encode_reply, mean
        self._references: dict[str, float] = {}

    @property
    def name(self) -> str:
        """The reward's own."""
        return self.reward.name

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        """Scores of the groups' completions alone; the references of these groups are had from then on by calling this."""
        rows = self.reward.score([self._with_reply(group) for group in groups])
        self._references = {}
        for group, row in zip(groups, rows, strict=True):
            beside = row[len(group.completions) :]
            found = beside[0] if beside else None
            self._references[group.prompt.prompt_id] = self.mean if found is None else found
        return [row[: len(group.completions)] for group, row in zip(groups, rows, strict=True)]

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[float]:
        """Reference rewards of the groups that were scored last, in the order of these."""
        return [self._references[group.prompt.prompt_id] for group in groups]

    def _with_reply(self, group: RolloutGroup) -> RolloutGroup:
        reply = group.prompt.columns.get("chosen")
        if not isinstance(reply, str):
            return group
        token_ids = tuple(self.encode_reply(reply))
        return replace(group, completions=(*group.completions, Completion(reply, token_ids, (0.0,) * len(token_ids), "stop")))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
