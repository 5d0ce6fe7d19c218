"""The frozen base as a judge of two replies: which is better, asked in both orders so that a liking for the first place cancels.

Owns the question and the arithmetic over a group. The judge that reads one reply at a time is zero_shot.py's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gemma_grpo import distributed
from gemma_grpo.data.batch import GroupBatch, pad_groups
from gemma_grpo.data.chat import comparison_ids, encode_plain
from gemma_grpo.model.attention import GroupLayout
from gemma_grpo.model.gemma import REFERENCE, Gemma
from gemma_grpo.reward.base import Scores
from gemma_grpo.reward.generative import scores_by_size
from gemma_grpo.types import RolloutGroup


class PairwiseJudge:
    """Scores each completion by its chance to beat others of its group; a conversation is computed once, whatever is compared in it.

    With `opponents` 0 every other completion is one: G (G - 1) comparisons a group, each order of a pair once. Fewer are drawn by the
    prompt and the place alone. A judge that only likes a place gives every completion one half.
    """

    name = "pairwise"

    def __init__(self, model: Gemma, opponents: int = 0, rubric: str | None = None) -> None:
        self.model, self.opponents, self.rubric = model, opponents, rubric
        self.first, self.second = (encode_plain(model.tokenizer, letter)[0] for letter in "AB")

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        """Mean chance to win, in [0, 1], of each completion, [N][G]; 0.5 for the only one of its group."""
        return scores_by_size(groups, self._of_one_size)

    def preferences(self, groups: Sequence[RolloutGroup]) -> list[float]:
        """Of groups of two: the chance that the first is better, both orders averaged. Swapping the two gives the complement."""
        pairs = [(0, 1)] * len(groups)
        return self._chances(groups, [[pair] for pair in pairs])[:, 0].tolist()

    def consistent(self, groups: Sequence[RolloutGroup]) -> list[bool]:
        """Of groups of two: whether both orders name the same reply as the better one."""
        forward, backward = self._log_odds(groups, [[(0, 1), (1, 0)]] * len(groups)).unbind(-1)
        return ((forward > 0) != (backward > 0)).tolist()

    def _of_one_size(self, groups: Sequence[RolloutGroup]) -> Float[Tensor, "N G"]:
        size = len(groups[0].completions)
        if size == 1:
            return torch.full((len(groups), 1), 0.5)
        pairs = [[(g, other) for g in range(size) for other in self._opponents(group, g)] for group in groups]
        return self._chances(groups, pairs).view(len(groups), size, -1).mean(-1)

    def _opponents(self, group: RolloutGroup, g: int) -> list[int]:
        others = [n for n in range(len(group.completions)) if n != g]
        if not self.opponents or self.opponents >= len(others):
            return others
        key = f"{group.prompt.prompt_id} {g}"
        return sorted(others, key=lambda n: hashlib.sha256(f"{key} {n}".encode()).digest())[: self.opponents]

    def _chances(self, groups: Sequence[RolloutGroup], pairs: Sequence[Sequence[tuple[int, int]]]) -> Float[Tensor, "N K"]:
        """Chance that the first of each pair wins, [N][K] pairs of places: sigmoid(z_A - z_B), both orders averaged."""
        ordered = [sorted({(a, b) for one in row for a, b in (one, one[::-1])}) for row in pairs]
        asked = self._log_odds(groups, ordered).sigmoid()
        rows = []
        for n, row in enumerate(pairs):
            chance = dict(zip(ordered[n], asked[n].tolist(), strict=False))
            rows.append([(chance[a, b] + 1 - chance[b, a]) / 2 for a, b in row])
        return torch.tensor(rows)

    @torch.no_grad()
    def _log_odds(self, groups: Sequence[RolloutGroup], pairs: Sequence[Sequence[tuple[int, int]]]) -> Float[Tensor, "N K"]:
        """logit(A) - logit(B) of each comparison, in the order shown; rows with fewer are padded with 0."""
        model = self.model
        direction = model.head_weight[self.first].detach().float() - model.head_weight[self.second].detach().float()
        questions = [
            [comparison_ids(model.tokenizer, group.completions[a].text, group.completions[b].text, self.rubric) for a, b in row]
            for group, row in zip(groups, pairs, strict=True)
        ]
        widest = max(len(row) for row in questions)
        padded = [[*row, *([row[0]] * (widest - len(row)))] for row in questions]
        batch = pad_groups([group.prompt.token_ids for group in groups], padded)
        found = torch.zeros(len(groups), widest)

        def read(piece: GroupBatch) -> Tensor:
            layout = GroupLayout(piece)
            last = layout.last_completion_index
            return (model.hidden_states(layout)[last.flatten()].float() @ direction).view(last.shape)

        with model.role(REFERENCE):
            for slot, values in model.budget.run(batch.to(model.device), read, doing="comparing"):
                slot.put(values, found)
        distributed.sum_([found], "comparing")
        return found
