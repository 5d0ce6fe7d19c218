"""PAR: a raw reward measured against a reference reply and bounded, so that an outlier cannot buy the whole update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gemma_grpo.reward.base import Reward
from gemma_grpo.types import Completion, Prompt, RolloutGroup


class PreferenceAsReward:
    """sigmoid(r - r_ref): the probability that the reply beats the reference reply (PAR, arXiv:2502.18770).

    The reference is the dataset's own preferred reply where the prompt has one (column "chosen"), else `mean`: the reward of the
    reference policy's samples. Each prompt's reference is scored once.
    """

    def __init__(self, reward: Reward, encode_reply: Callable[[str], Sequence[int]], mean: float) -> None:
        self.reward, self.encode_reply, self.mean = reward, encode_reply, mean
        self._references: dict[str, float] = {}

    def __call__(self, values: Sequence[Sequence[float | None]], groups: Sequence[RolloutGroup]) -> list[list[float | None]]:
        """Raw rewards [N][G] -> shaped [N][G] in (0, 1)."""
        self._score_references([group.prompt for group in groups])
        return [
            [None if value is None else _sigmoid(value - self._references[group.prompt.prompt_id]) for value in row]
            for row, group in zip(values, groups, strict=True)
        ]

    def _score_references(self, prompts: Sequence[Prompt]) -> None:
        new = [prompt for prompt in prompts if prompt.prompt_id not in self._references]
        with_reply = [prompt for prompt in new if isinstance(prompt.columns.get("chosen"), str)]
        scores = self.reward.score([self._as_group(prompt) for prompt in with_reply])
        self._references |= {prompt.prompt_id: self.mean for prompt in new}
        self._references |= {prompt.prompt_id: row[0] for prompt, row in zip(with_reply, scores, strict=True) if row[0] is not None}

    def _as_group(self, prompt: Prompt) -> RolloutGroup:
        reply = str(prompt.columns["chosen"])
        token_ids = tuple(self.encode_reply(reply))
        return RolloutGroup(prompt, (Completion(reply, token_ids, (0.0,) * len(token_ids), "stop"),), policy_step=0)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
