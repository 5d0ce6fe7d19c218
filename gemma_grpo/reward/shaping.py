"""PAR: a raw reward measured against a reference reply and bounded, so that an outlier cannot buy the whole update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gemma_grpo.reward.base import Reward, RewardError, Scores, Shape
from gemma_grpo.types import Completion, Prompt, RolloutGroup

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
    """One reference reward per group: of the dataset's preferred reply where the prompt has one (column "chosen"), else `mean`.

    `mean` is the reward of the reference policy's samples. Each prompt's reply is scored once and remembered.
    """

    def __init__(self, reward: Reward, encode_reply: Callable[[str], Sequence[int]], mean: float) -> None:
        self.reward, self.encode_reply, self.mean = reward, encode_reply, mean
        self._known: dict[str, float] = {}

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[float]:
        """Reference rewards in the order of the groups."""
        new = {group.prompt.prompt_id: group.prompt for group in groups if group.prompt.prompt_id not in self._known}
        with_reply = [prompt for prompt in new.values() if isinstance(prompt.columns.get("chosen"), str)]
        scores = self.reward.score([self._as_group(prompt) for prompt in with_reply])
        self._known |= dict.fromkeys(new, self.mean)
        self._known |= {prompt.prompt_id: row[0] for prompt, row in zip(with_reply, scores, strict=True) if row[0] is not None}
        return [self._known[group.prompt.prompt_id] for group in groups]

    def _as_group(self, prompt: Prompt) -> RolloutGroup:
        reply = str(prompt.columns["chosen"])
        token_ids = tuple(self.encode_reply(reply))
        return RolloutGroup(prompt, (Completion(reply, token_ids, (0.0,) * len(token_ids), "stop"),), policy_step=0)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
