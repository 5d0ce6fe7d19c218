"""PAR: a raw reward measured against a reference reply and bounded, so that an outlier cannot buy the whole update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from gemma_grpo.reward.base import Reward, RewardError, Scores, Shape
from gemma_grpo.types import Completion, RolloutGroup

References = Callable[[Sequence[RolloutGroup]], Sequence[float]]
Replies = Callable[[Sequence[RolloutGroup]], "Sequence[Completion | None]"]
"""One reply to each group's prompt, None where there is none."""


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
    """A reward, and one reference reward per group: of the reply that `replies` gives for its prompt, elsewhere `mean`.

    The reply is scored beside the group's completions, as one more of them: their prompt is computed once.
    """

    def __init__(self, reward: Reward, replies: Replies, mean: float) -> None:
        self.reward, self.replies, self.mean = reward, replies, mean
        self._references: dict[str, float] = {}

    @property
    def name(self) -> str:
        """The reward's own."""
        return self.reward.name

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        """Scores of the groups' completions alone; the references of these groups are had from then on by calling this."""
        rows = self.reward.score(with_replies(groups, self.replies))
        self._references = {}
        for group, row in zip(groups, rows, strict=True):
            beside = row[len(group.completions) :]
            found = beside[0] if beside else None
            self._references[group.prompt.prompt_id] = self.mean if found is None else found
        return [row[: len(group.completions)] for group, row in zip(groups, rows, strict=True)]

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[float]:
        """Reference rewards of the groups that were scored last, in the order of these."""
        return [self._references[group.prompt.prompt_id] for group in groups]


def chosen_replies(encode_reply: Callable[[str], Sequence[int]]) -> Replies:
    """The dataset's preferred replies (column "chosen") as completions; None for a prompt that has none."""

    def replies(groups: Sequence[RolloutGroup]) -> list[Completion | None]:
        texts = [group.prompt.columns.get("chosen") for group in groups]
        return [_completion(text, encode_reply(text)) if isinstance(text, str) else None for text in texts]

    return replies


def with_replies(groups: Sequence[RolloutGroup], replies: Replies) -> list[RolloutGroup]:
    """The groups with the reply of each prompt as one more completion; as they are where there is none."""
    found = replies(groups)
    return [
        group if reply is None else replace(group, completions=(*group.completions, reply))
        for group, reply in zip(groups, found, strict=True)
    ]


def _completion(text: str, token_ids: Sequence[int]) -> Completion:
    return Completion(text, tuple(token_ids), (0.0,) * len(token_ids), "stop")


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
