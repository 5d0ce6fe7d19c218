"""One training step: rollout, reward, reference pass, advantages, update, metrics. The trainer's loop repeats it.

A step that is broken off keeps what it has (`Stepper.under_way`), and can go on from there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from gemma_grpo import distributed, watchdog
from gemma_grpo.config import GRPOConfig
from gemma_grpo.data.batch import GroupBatch, PolicyBatch
from gemma_grpo.grpo.advantages import BASELINES, SCALES, flat_group_fraction, gdpo_advantages, group_advantages
from gemma_grpo.grpo.loss import kl_reward_penalty
from gemma_grpo.grpo.progress import StepUnderWay, rollout_batch
from gemma_grpo.grpo.update import PolicyUpdater
from gemma_grpo.model.gemma import Gemma, ModelRole
from gemma_grpo.model.logprobs import completion_logprobs
from gemma_grpo.model.memory import release
from gemma_grpo.reward.base import RewardStack, StackScores
from gemma_grpo.reward.zero_shot import ZeroShotJudge
from gemma_grpo.rollout.engine import RolloutEngine, SamplingParams
from gemma_grpo.types import Prompt, RolloutGroup, ScoredGroup, StepRecord, TokenDrift

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Stepper:
    """What a step needs, put together once; the only state is the updater's, a token count, and what a broken-off step had."""

    def __init__(
        self,
        model: Gemma,
        engine: RolloutEngine,
        rewards: RewardStack,
        updater: PolicyUpdater,
        config: GRPOConfig,
        *,
        judge: ZeroShotJudge | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.engine, self.rewards, self.updater, self.config = model, engine, rewards, updater, config
        self.judge = judge
        """The one among the rewards, if any: its pass gives the reference's log-probabilities too, in the time of the reward."""
        self.clock = clock
        """Seconds. A device may still be working when the plain one is read; a profiled run's waits for it."""
        self.num_tokens = 0
        """Completion tokens learned from so far."""
        self.under_way: StepUnderWay | None = None
        """What the step had that was broken off last; None between steps."""
        self.reward_warnings: tuple[str, ...] = ()
        """What the rewards of the last step skipped, in sentences."""
        self.half_counted = False
        """The update is made and the step is not: no checkpoint can say so."""
        self._doing = ""

    def train_step(self, prompts: Sequence[Prompt], step: int, begun: StepUnderWay | None = None) -> tuple[StepRecord, list[ScoredGroup]]:
        """Sample, score and learn from one rollout batch; `step` counts from 0. With `begun`, only what is left of it."""
        seconds: dict[str, float] = {}
        self._doing = f"step {step + 1}, prompts {', '.join(prompt.prompt_id for prompt in prompts)}"
        now = self.under_way = begun or StepUnderWay(self._rollout(prompts, step, seconds))
        if now.batch is None or now.scores is None:
            now = self.under_way = StepUnderWay(now.groups, *self._scored(now.groups, seconds))
        groups, scores, batch = now.groups, now.scores, now.batch
        assert scores is not None
        assert batch is not None
        tokens = self.num_tokens + int(batch.completion_mask.sum())
        measured = {**reward_metrics(scores), **length_metrics(groups)}
        if self.config.serving.urls:
            measured["staleness"] = statistics.fmean(step - group.policy_step for group in groups)
        scored = scored_groups(groups, scores, batch.advantages)
        if batch.ref_logprobs is not None and not self.config.sampling.is_filtered:
            scored = with_drift(scored, batch.ref_logprobs, self.model.tokenizer)
        with self._phase("update", seconds):
            try:
                metrics = self.updater.update(batch, step, now.passes)  # planning_steps x micro-batches
            except BaseException:
                self.under_way = replace(now, passes=self.updater.passes)
                raise
            self.half_counted = True
        self.under_way, self.reward_warnings, self.num_tokens = None, scores.warnings, tokens
        record = StepRecord(step + 1, seconds, {**measured, **metrics, "num_tokens": float(tokens)})
        self.half_counted = False
        return record, scored

    def _rollout(self, prompts: Sequence[Prompt], step: int, seconds: dict[str, float]) -> list[RolloutGroup]:
        with self._phase("rollout", seconds):
            return self.engine.sample(prompts, sampling_params(self.config, step))  # one prefill per prompt

    def _scored(self, groups: Sequence[RolloutGroup], seconds: dict[str, float]) -> tuple[StackScores, PolicyBatch]:
        with self._one_pass_for_judge_and_reference(groups):
            with self._phase("reward", seconds):
                scores = self.rewards.score(groups)
            with self._phase("reference", seconds):
                beta, weights = self.updater.beta.beta, self.rewards.weights
                return scores, policy_batch(self.model, groups, scores, weights, self.config, beta, judge=self.judge)

    def _one_pass_for_judge_and_reference(self, groups: Sequence[RolloutGroup]) -> AbstractContextManager[None]:
        if self.judge is None or self.config.kl.placement == "off":
            return nullcontext()
        return self.judge.keeping_logprobs(groups, temperature=self.config.temperature)

    @contextmanager
    def _phase(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        """One phase: its time is taken, and what it leaves in torch's caches goes back, as the next one needs other sizes."""
        with watchdog.phase(name, self._doing):
            started = self.clock()
            yield
            release(self.model.device)
            seconds[name] = self.clock() - started


def sampling_params(config: GRPOConfig, step: int, *, role: str = "policy", num_generations: int | None = None) -> SamplingParams:
    """How a run samples, in training and in evaluation alike."""
    return SamplingParams(
        num_generations=num_generations or config.num_generations,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        top_k=config.sampling.top_k,
        top_p=config.sampling.top_p,
        seed=config.seed,
        step=step,
        role=role,
    )


@torch.no_grad()
def role_logprobs(model: Gemma, batch: GroupBatch, role: ModelRole, *, temperature: float) -> Float[Tensor, "N G C"]:
    """Log-probabilities of the completions under a role, without gradients, as many at a time as the model's token budget allows."""
    logprobs = torch.zeros(batch.completion_ids.shape, device=batch.completion_ids.device)

    def score(piece: GroupBatch) -> Tensor:
        return completion_logprobs(model, piece, temperature=temperature)[0]

    with model.role(role):
        for slot, values in model.budget.run(batch, score, doing=f"scoring with the {role}"):
            slot.put(values, logprobs)
    distributed.sum_([logprobs], f"scoring with the {role}")
    return logprobs


def reference_logprobs(
    model: Gemma, groups: Sequence[RolloutGroup], batch: GroupBatch, judge: ZeroShotJudge | None, *, temperature: float
) -> Float[Tensor, "N G C"]:
    """The frozen base's log-probabilities: those that the zero-shot judge kept of its own pass, else of a pass for them alone."""
    kept = None if judge is None else judge.kept_logprobs(groups, batch)
    return role_logprobs(model, batch, "reference", temperature=temperature) if kept is None else kept


def policy_batch(
    model: Gemma,
    groups: Sequence[RolloutGroup],
    scores: StackScores,
    weights: Mapping[str, float],
    config: GRPOConfig,
    beta: float,
    *,
    judge: ZeroShotJudge | None = None,
) -> PolicyBatch:
    """Everything one update learns from. The reference pass is skipped when no KL penalty asks for it."""
    batch = rollout_batch(groups, torch.zeros((len(groups), len(groups[0].completions)), device=model.device), None)
    ref = None
    if config.kl.placement != "off":
        ref = reference_logprobs(model, groups, batch, judge, temperature=config.temperature)
    penalty = None
    if config.kl.placement == "reward" and ref is not None:
        flat = (tensor.flatten(0, 1) for tensor in (batch.sampling_logprobs, ref, batch.completion_mask))
        penalty = kl_reward_penalty(*flat, beta=beta).view(len(groups), -1)
    advantages = step_advantages(scores, batch.completion_mask.sum(-1), weights, config, penalty)
    for name, values in {"reference's log-probabilities": ref, "advantages": advantages}.items():
        _check_finite(name, values, groups)
    return replace(batch, advantages=advantages, ref_logprobs=ref)


def _check_finite(name: str, values: Tensor | None, groups: Sequence[RolloutGroup]) -> None:
    """Raise FloatingPointError naming the first prompt whose values, [N ...], are not all finite."""
    broken = [] if values is None else (~torch.isfinite(values)).flatten(1).any(-1).nonzero().flatten().tolist()
    if broken:
        prompts = ", ".join(groups[n].prompt.prompt_id for n in broken[:3])
        raise FloatingPointError(f"the {name} of prompt {prompts} are not finite; nothing was updated. Look at the rewards and the base.")


def step_advantages(
    scores: StackScores,
    lengths: Tensor,
    weights: Mapping[str, float],
    config: GRPOConfig,
    penalty: Float[Tensor, "N G"] | None = None,
) -> Float[Tensor, "N G"]:
    """Advantages of the whole step; `penalty` is the KL that counts as part of the reward."""
    settings = config.advantage
    chosen = {"baseline": BASELINES[settings.baseline], "scale": SCALES[settings.scale], "clip": settings.clip}
    if settings.aggregation == "gdpo":
        parts = torch.stack([as_tensor(part) for part in scores.parts.values()]).to(lengths.device)
        part_weights = torch.tensor([weights[name] for name in scores.parts], device=lengths.device)
        return gdpo_advantages(parts, part_weights, lengths, **chosen)  # type: ignore[arg-type]
    rewards = as_tensor(scores.rewards).to(lengths.device)
    return group_advantages(rewards if penalty is None else rewards - penalty, lengths, **chosen)  # type: ignore[arg-type]


def as_tensor(scores: Sequence[Sequence[float | None]]) -> Float[Tensor, "N G"]:
    """Scores as float32, NaN where a completion was not scored."""
    return torch.tensor([[float("nan") if value is None else value for value in row] for row in scores], dtype=torch.float32)


def scored_groups(groups: Sequence[RolloutGroup], scores: StackScores, advantages: Float[Tensor, "N G"]) -> list[ScoredGroup]:
    """Groups with what was made of them, for the samples log."""
    return [
        ScoredGroup(
            group=group,
            rewards=tuple(scores.rewards[n]),
            reward_parts={name: tuple(part[n]) for name, part in scores.parts.items()},
            advantages=tuple(advantages[n].tolist()),
        )
        for n, group in enumerate(groups)
    ]


def with_drift(
    scored: Sequence[ScoredGroup], ref_logprobs: Float[Tensor, "N G C"], tokenizer: PreTrainedTokenizerBase
) -> list[ScoredGroup]:
    """The same groups; the one whose rewards differ most, so that a step learns most from it, has its tokens' log-ratios too.

    One group alone: tokens take a log several times the room of the text.
    """

    def spread(n: int) -> float:
        rewards = [reward for reward in scored[n].rewards if reward is not None]
        return max(rewards) - min(rewards) if rewards else 0.0

    shown = max(range(len(scored)), key=spread)
    drifts = []
    for completion, reference in zip(scored[shown].group.completions, ref_logprobs[shown].tolist(), strict=True):
        ids, policy = list(completion.token_ids), completion.sampling_logprobs
        ratios = tuple(round(now - before, 3) + 0.0 for now, before in zip(policy, reference, strict=False))  # + 0.0: no -0.0
        drifts.append(TokenDrift(tuple(tokenizer.convert_ids_to_tokens(ids)), ratios))
    return [replace(group, drifts=tuple(drifts)) if n == shown else group for n, group in enumerate(scored)]


def reward_metrics(scores: StackScores) -> dict[str, float]:
    """Mean, within-group spread and coverage of the rewards; mean and std of each raw part, and what it skipped where it may."""
    rewards = as_tensor(scores.rewards)
    spreads = [statistics.stdev(row) for row in ([v for v in values if v is not None] for values in scores.rewards) if len(row) > 1]
    metrics = {
        "reward_std": statistics.fmean(spreads) if spreads else 0.0,
        "frac_reward_zero_std": flat_group_fraction(rewards),
        "unscored": float(rewards.isnan().sum()),
    }
    scored = [value for row in scores.rewards for value in row if value is not None]
    if scored:
        metrics = {"reward": statistics.fmean(scored), **metrics}
    for name, part in scores.parts.items():
        values = [value for row in part for value in row if value is not None]
        if values:
            metrics[f"rewards/{name}/mean"] = statistics.fmean(values)
            metrics[f"rewards/{name}/std"] = statistics.pstdev(values)
    metrics |= {f"rewards/{name}/skipped": float(count) for name, count in scores.skipped.items()}
    return metrics


def length_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Completion lengths in tokens, stop token included, and the share cut by the limit."""
    completions = [completion for group in groups for completion in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    return {
        "completions/mean_length": statistics.fmean(lengths),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": statistics.fmean(completion.finish == "length" for completion in completions),
    }
