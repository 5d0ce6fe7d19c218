"""The frozen base as a judge, and what the KL's reference has from the same pass.

Zero-shot judge and reference are the same weights on the same tokens: [prompt][completion][question] gives the log-probabilities of
the completion, which nothing behind it changes, and the verdict at the end. Owns what is kept between the two who ask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gemma_grpo import distributed
from gemma_grpo.data.batch import GroupBatch, pad_rollouts
from gemma_grpo.model.attention import GroupLayout
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.logprobs import shifted, token_logprobs
from gemma_grpo.reward.base import Scores
from gemma_grpo.reward.generative import Judge, scores_by_size
from gemma_grpo.types import Completion, RolloutGroup

Text: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens of a prompt and of a completion: all that the frozen base's numbers depend on, so that none can be out of date."""


@dataclass(frozen=True)
class JudgedBatch(GroupBatch):
    """Completions followed by the question."""

    wanted_mask: Bool[Tensor, "N G C"]
    """True on the tokens whose log-probabilities are asked for as well."""


@dataclass(frozen=True)
class _Wanted:
    """Log-probabilities that a pass over some texts shall keep."""

    texts: frozenset[Text]
    temperature: float
    kept: dict[Text, Tensor] = field(default_factory=dict)


class ZeroShotJudge:
    """Scores rollouts by the log-odds of the model without adapters."""

    name = "judge"

    def __init__(self, model: Gemma, rubric: str | None = None) -> None:
        self.judge = Judge(model, rubric)
        self._wanted = _Wanted(frozenset(), 1.0)

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        """Log-odds of each completion, [N][G]. A completion cut by the length limit is judged as it is, unfinished."""
        return scores_by_size(groups, self._read)

    @contextmanager
    def keeping_logprobs(self, groups: Sequence[RolloutGroup], *, temperature: float) -> Iterator[None]:
        """Within, a score of these groups' completions keeps their log-probabilities too; forgotten at the end."""
        texts = frozenset(_text(group, completion) for group in groups for completion in group.completions)
        self._wanted = _Wanted(texts, temperature)
        try:
            yield
        finally:
            self._wanted = _Wanted(frozenset(), 1.0)

    def kept_logprobs(self, groups: Sequence[RolloutGroup], batch: GroupBatch) -> Float[Tensor, "N G C"] | None:
        """What was kept of these groups, in the shape of their batch; None unless all of it was."""
        kept = [self._wanted.kept.get(_text(group, completion)) for group in groups for completion in group.completions]
        found = [row for row in kept if row is not None]
        if not found or len(found) < len(kept):
            return None
        mask = batch.completion_mask
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, torch.cat(found))

    @torch.no_grad()
    def _read(self, groups: Sequence[RolloutGroup]) -> Float[Tensor, "N G"]:
        """Verdicts on groups of one size; keeps the log-probabilities that are wanted."""
        model, batch = self.judge.model, pad_rollouts(groups, self.judge.suffix)
        wanted = torch.zeros_like(batch.completion_mask)
        texts = {(n, g): _text(group, completion) for n, group in enumerate(groups) for g, completion in enumerate(group.completions)}
        asked = {place: text for place, text in texts.items() if text in self._wanted.texts}
        for (n, g), (_, tokens) in asked.items():
            wanted[n, g, : len(tokens)] = True
        verdicts = torch.zeros(batch.completion_ids.shape[:2])
        logprobs = torch.zeros(wanted.shape, device=model.device)
        with model.role("reference"):
            judged = JudgedBatch(**vars(batch), wanted_mask=wanted).to(model.device)
            for slot, (log_odds, values) in model.budget.run(judged, self._read_piece, doing="judging"):
                slot.put(log_odds, verdicts)
                slot.put(values, logprobs)
        distributed.sum_([verdicts, logprobs], "judging")
        self._wanted.kept.update({text: logprobs[n, g, : len(text[1])] for (n, g), text in asked.items()})
        return verdicts

    def _read_piece(self, piece: JudgedBatch) -> tuple[Float[Tensor, "N G"], Float[Tensor, "N G C"]]:
        layout = GroupLayout(piece)
        hidden = self.judge.model.hidden_states(layout)
        wanted = piece.wanted_mask
        sources, targets = shifted(layout)[wanted[piece.completion_mask]], piece.completion_ids[wanted]
        logprobs, _ = token_logprobs(hidden[sources], self.judge.model.head_weight, targets, self._wanted.temperature)
        values = torch.zeros(wanted.shape, dtype=torch.float32, device=wanted.device).masked_scatter(wanted, logprobs)
        return self.judge.verdicts(layout, hidden), values


def _text(group: RolloutGroup, completion: Completion) -> Text:
    return group.prompt.token_ids, completion.token_ids
