"""The plain ways to use preferences, to be compared with: best-of-n by the reward, DPO, SFT on the preferred replies.

Each answers the evaluation's prompts and is measured as the tuned policy is, against the same replies of the untouched model. DPO and SFT
learn from the pairs that the reward learned from, with an adapter of the same size, one epoch, and reward_model's own settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from gemma_grpo.checkpoint import saving
from gemma_grpo.config import GRPOConfig
from gemma_grpo.evaluation import best_of_n_kl
from gemma_grpo.grpo.assess import EVALUATION_STEP, Scorers, compare, evaluate_refusals, evaluation_samples, sample_in_chunks, sequence_kl
from gemma_grpo.grpo.setup import TrainingData
from gemma_grpo.grpo.step import sampling_params
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.reward.implicit import ImplicitScorer, LikelihoodScorer, likelihood_loss
from gemma_grpo.reward.training import RewardTraining
from gemma_grpo.rollout.engine import RolloutEngine
from gemma_grpo.types import RolloutGroup

BEST_OF = (4, 16)
DPO, SFT = "dpo", "sft"
KEPT = (
    "gold",
    "witness",
    "reward",
    "win_rate",
    "win_rate_chosen",
    "kl_sequence",
    "length",
    "refusal_harmful",
    "refusal_benign",
    "refusal_looks_harmful",
)
"""Of a summary: the numbers, and not the samples."""


class Baselines:
    """Trains and measures them for one run."""

    def __init__(
        self, run: RunDirectory, model: Gemma, engine: RolloutEngine, scorers: Scorers, data: TrainingData, config: GRPOConfig
    ) -> None:
        self.run, self.model, self.engine, self.scorers, self.data, self.config = run, model, engine, scorers, data, config
        self.prompts = list(data.held_out_prompts[: config.evaluation.num_prompts])

    def measure(self, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
        """Name -> numbers of evaluation.json; without pairs only best-of-n. Empty without prompts to evaluate on."""
        if not self.prompts:
            return {}
        before = evaluation_samples(self.engine, self.prompts, self.config, "reference")
        found = {}
        for n in BEST_OF:
            say(f"best of {n}")
            found[f"best of {n}"] = self._best_of(n, before)
        for name in (DPO, SFT) if self.data.pairs else ():
            say(f"{name.upper()} on {len(self.data.pairs)} pairs")
            self._train(name)
            after = evaluation_samples(self.engine, self.prompts, self.config, name)
            found[name.upper()] = self._compared(before, after, partial(sequence_kl, self.model, after, self.config, name))
            found[name.upper()] |= evaluate_refusals(self.engine, self.data.look_alikes, self.config, name)
        return found

    def _train(self, name: str) -> None:
        settings = self.config.reward_model.model_copy(update={"centering": 0.0})
        scorer = ImplicitScorer(self.model, settings.dpo_beta) if name == DPO else LikelihoodScorer(self.model)
        loss = None if name == DPO else likelihood_loss  # None: Bradley-Terry with the settings' label_smoothing
        self.model.add_adapter(name)
        RewardTraining(scorer, self.data.pairs, settings, seed=self.config.seed, adapter=name, loss=loss).run()
        folder = self.run.path / "baselines" / name
        with saving(folder):
            self.model.save_adapter(name, folder)

    def _best_of(self, n: int, before: Sequence[RolloutGroup]) -> dict[str, Any]:
        """Of n replies of the untouched model to each prompt the one that the reward likes best; drawn for each reply anew."""
        wanted = self.config.evaluation.num_completions
        params = sampling_params(self.config, EVALUATION_STEP, role="reference", num_generations=n * wanted)
        groups = sample_in_chunks(self.engine, self.prompts, params, self.config.completions_per_step)
        rewards = self.scorers.rewards.score(groups).rewards
        after = []
        for group, row in zip(groups, rewards, strict=True):
            scores = [-float("inf") if value is None else value for value in row]
            parts = [range(k * n, (k + 1) * n) for k in range(wanted)]
            after.append(replace(group, completions=tuple(group.completions[max(part, key=scores.__getitem__)] for part in parts)))
        return self._compared(before, after, lambda: [[best_of_n_kl(n)] * wanted for _ in after])

    def _compared(
        self, before: Sequence[RolloutGroup], after: Sequence[RolloutGroup], kl: Callable[[], Sequence[Sequence[float]]]
    ) -> dict[str, Any]:
        summary: Mapping[str, Any] = compare(self.model, self.scorers, self.prompts, (before, after), kl, self.config)
        return {name: summary[name] for name in KEPT if name in summary}
