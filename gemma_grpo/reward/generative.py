"""The generative reward: log-odds that Gemma answers "Yes" to "is this a good reply?", trained on preference pairs.

There is no head: a reward adapter starts from the model's own verdict, above chance, and scores a rollout's own tokens
followed by a fixed suffix. Not here: several adapters as one (ensemble.py), how one is trained (training.py), quality figures
(quality.py), and the judge that is not trained (zero_shot.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gemma_grpo import distributed
from gemma_grpo.data.batch import GroupBatch, pad_groups, pad_rollouts
from gemma_grpo.data.chat import encode_plain, judge_suffix_ids
from gemma_grpo.data.prompts import EncodedPair
from gemma_grpo.model.attention import GroupLayout
from gemma_grpo.model.gemma import Gemma, ModelRole
from gemma_grpo.reward.base import Scores
from gemma_grpo.types import Completion, Prompt, RolloutGroup

JUDGE_QUESTION = "Is this a good reply? Answer Yes or No."


class Judge:
    """Reads verdicts: knows the question's tokens and the two answers' rows of the head. A rubric comes before the question."""

    def __init__(self, model: Gemma, rubric: str | None = None) -> None:
        self.model = model
        self.suffix = judge_suffix_ids(model.tokenizer, JUDGE_QUESTION if rubric is None else f"{rubric.strip()}\n\n{JUDGE_QUESTION}")
        self.yes, self.no = (_first_token(model, answer) for answer in ("Yes", "No"))

    def log_odds(self, batch: GroupBatch) -> Float[Tensor, "N G"]:
        """logit(Yes) - logit(No) after the last token of each completion, which ends with the suffix; of the model's present role."""
        layout = GroupLayout(batch)
        return self.verdicts(layout, self.model.hidden_states(layout))

    def batch(self, pairs: Sequence[EncodedPair]) -> GroupBatch:
        """Each pair as a group of two, the chosen reply first, each followed by the question."""
        return pair_batch(self, pairs)

    def scores(self, piece: GroupBatch) -> Float[Tensor, "N 2"]:
        """The verdicts on pairs, of the model's present role: what is trained."""
        return self.log_odds(piece)

    def verdicts(self, layout: GroupLayout, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "N G"]:
        """The same from a layout's hidden states."""
        last = layout.last_completion_index  # (N, G)
        head = self.model.head_weight
        # two rows of the head instead of 262,144; their difference is taken in float32
        direction = head[self.yes].detach().float() - head[self.no].detach().float()
        return (hidden[last.flatten()].float() @ direction).view(last.shape)


class GenerativeReward:
    """Scores rollouts by the judge's log-odds with one trained adapter."""

    def __init__(self, model: Gemma, adapter: str = "reward", *, name: str = "generative") -> None:
        self.judge, self.adapter, self.name = Judge(model), adapter, name

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        """Log-odds of each completion, [N][G]. A completion cut by the length limit is judged as it is, unfinished."""
        return scores_by_size(groups, lambda part: _verdicts(self.judge, pad_rollouts(part, self.judge.suffix), self.adapter))


def scores_by_size(groups: Sequence[RolloutGroup], read: Callable[[Sequence[RolloutGroup]], Float[Tensor, "N G"]]) -> Scores:
    """Scores of groups that need not be of one size; those of one size are read together."""
    sizes = [len(group.completions) for group in groups]
    scores: Scores = [[] for _ in groups]
    for size in sorted(set(sizes)):
        places = [n for n, other in enumerate(sizes) if other == size]
        for n, row in zip(places, read([groups[n] for n in places]).tolist(), strict=True):
            scores[n] = row
    return scores


def score_pairs(judge: Judge, pairs: Sequence[EncodedPair], role: ModelRole) -> Float[Tensor, "N 2"]:
    """Log-odds of the chosen and the rejected reply of each pair."""
    return _verdicts(judge, pair_batch(judge, pairs), role) if pairs else torch.zeros(0, 2)


@torch.no_grad()
def _verdicts(judge: Judge, batch: GroupBatch, role: ModelRole) -> Float[Tensor, "N G"]:
    """Log-odds under a role, as many at a time as the model's token budget allows."""
    model, verdicts = judge.model, torch.zeros(batch.completion_ids.shape[:2])
    with model.role(role):
        for slot, log_odds in model.budget.run(batch.to(model.device), judge.log_odds, doing="judging"):
            slot.put(log_odds, verdicts)
    distributed.sum_([verdicts], "judging")
    return verdicts


def pair_batch(judge: Judge, pairs: Sequence[EncodedPair]) -> GroupBatch:
    """Each pair as a group of two: the chosen and the rejected reply, followed by the judge's question."""
    replies = [[(*reply, *judge.suffix) for reply in (pair.chosen_ids, pair.rejected_ids)] for pair in pairs]
    return pad_groups([pair.prompt_ids for pair in pairs], replies).to(judge.model.device)


def pair_groups(pairs: Sequence[EncodedPair]) -> list[RolloutGroup]:
    """Each pair as a group of two finished completions, the chosen one first: what any reward can score."""
    return [
        RolloutGroup(
            Prompt(item.pair.pair_id, item.pair.source, item.pair.messages, item.prompt_ids, item.conversation_id, item.pair.columns),
            tuple(
                Completion(text, ids, (0.0,) * len(ids), "stop")
                for text, ids in ((item.pair.chosen, item.chosen_ids), (item.pair.rejected, item.rejected_ids))
            ),
            0,
        )
        for item in pairs
    ]


def _first_token(model: Gemma, answer: str) -> int:
    return encode_plain(model.tokenizer, answer)[0]
