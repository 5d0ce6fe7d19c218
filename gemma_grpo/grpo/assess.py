"""Measuring: the reward adapter on pairs it never saw, the policy on prompts it never saw. Numbers are made elsewhere.

Statistics are evaluation.py's and reward/quality.py's; this file runs the model for them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from gemma_grpo import distributed
from gemma_grpo.config import GRPOConfig
from gemma_grpo.data.batch import pad_rollouts
from gemma_grpo.data.chat import reply_ids
from gemma_grpo.data.prompts import EncodedPair
from gemma_grpo.evaluation import EvaluatedReply, refusals, summarise
from gemma_grpo.grpo.setup import Gold, TrainingData
from gemma_grpo.grpo.step import reference_logprobs, role_logprobs, sampling_params
from gemma_grpo.model.gemma import REFERENCE, Gemma
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.reward.base import Reward, RewardStack
from gemma_grpo.reward.canaries import canary_report, canary_warning
from gemma_grpo.reward.ensemble import EnsembleReward, length_slope
from gemma_grpo.reward.generative import Judge, pair_groups, score_pairs
from gemma_grpo.reward.lexical import LexicalReward
from gemma_grpo.reward.quality import (
    SUSPICIOUS,
    accuracy,
    agreement,
    leakage,
    leakage_warning,
    quality_report,
    within_group_length_correlation,
)
from gemma_grpo.reward.shaping import chosen_replies
from gemma_grpo.reward.zero_shot import ZeroShotJudge
from gemma_grpo.rollout.engine import RolloutEngine, SamplingParams
from gemma_grpo.types import Completion, PreferencePair, Prompt, RolloutGroup

REFERENCE_PROMPTS, REFERENCE_SAMPLES, SLOPE_PAIRS = 64, 4, 1024
EVALUATION_STEP = -1
"""Sampling counter of the evaluation: no training step draws the same numbers."""
_ROLES = ("reference", "policy")


def measure_judge(
    model: Gemma,
    engine: RolloutEngine,
    reward: EnsembleReward,
    *,
    data: TrainingData,
    config: GRPOConfig,
    margin: Callable[[EncodedPair], float] | None,
) -> dict[str, Any]:
    """How good a trained judge is on pairs and prompts it never saw: the content of calibration.json.

    `margin` gives a pair's true margin where it is known: accuracy against flipped labels cannot exceed 80 % in the miniature.
    """
    held_out, prompts = data.held_out_pairs, data.held_out_prompts or data.prompts
    zero_shot = score_pairs(Judge(model), held_out, REFERENCE)
    groups = pair_groups(held_out)
    by_member = reward.by_member(groups)
    scores = torch.tensor(reward.combined(by_member, groups), dtype=torch.float32).reshape(-1, 2)
    report = quality_report([pair.pair for pair in held_out], scores, zero_shot)
    if margin is not None:
        true_margins = torch.tensor([margin(pair) for pair in held_out])
        report["accuracy_against_gold"] = accuracy((scores[:, 0] - scores[:, 1]) * true_margins.sign())
    if len(by_member) > 1:
        report["agreement"] = agreement(by_member.values())
    train = [pair.pair for pair in data.pairs]
    report["accuracy_lexical"] = _lexical_accuracy(train, groups) if train and held_out else None
    if (report["accuracy"]["value"] or 0.0) > SUSPICIOUS:
        report["leakage"] = leakage([*train, *(pair.pair for pair in data.witness_pairs)], [pair.pair for pair in held_out])
    report["canaries"] = canary_report(reward.score, prompts, model.tokenizer)
    return report | reference_rewards(reward, reference_samples(engine, data, config))


def _lexical_accuracy(train: Sequence[PreferencePair], held_out: Sequence[RolloutGroup]) -> dict[str, Any]:
    """Of the judge of words, trained on the same pairs and tested on the same: what a reward adapter should beat."""
    scores = torch.tensor(LexicalReward(train).score(held_out))
    return accuracy(scores[:, 0] - scores[:, 1])


def length_slopes(reward: EnsembleReward, pairs: Sequence[EncodedPair]) -> dict[str, float]:
    """By source, what a further token adds to the margin of the pairs a judge learned from."""
    groups = pair_groups(pairs[:SLOPE_PAIRS])
    rows: dict[str, list[tuple[float, float]]] = {}
    for group, row in zip(groups, reward.score(groups), strict=True):
        chosen, rejected = (len(completion.token_ids) for completion in group.completions)
        if row[0] is not None and row[1] is not None:
            rows.setdefault(group.prompt.source, []).append((row[0] - row[1], float(chosen - rejected)))
    return {source: length_slope(*zip(*found, strict=True)) for source, found in sorted(rows.items())}


def judge_warnings(run: RunDirectory, calibration: Mapping[str, Any], judge: ZeroShotJudge | None, prompts: Sequence[Prompt]) -> list[str]:
    """What is to be said of the judges a run trains with: replies that fool them. The zero-shot judge's report is kept in run.json."""
    reports = {EnsembleReward.name: calibration.get("canaries", {})}
    if judge is not None:
        report = run.read_run().get("canaries") or canary_report(judge.score, prompts, judge.judge.model.tokenizer)
        run.update_run(canaries=report)
        reports[judge.name] = report
    leaks = leakage_warning(calibration)
    return [text for name, report in reports.items() if (text := canary_warning(name, report)) is not None] + ([leaks] if leaks else [])


def reference_samples(engine: RolloutEngine, data: TrainingData, config: GRPOConfig) -> list[RolloutGroup]:
    """Replies of the untouched model to a few held-out prompts (to training's, where none are held out): what judges are measured on."""
    prompts = (data.held_out_prompts or data.prompts)[:REFERENCE_PROMPTS]
    params = sampling_params(config, EVALUATION_STEP, role="reference", num_generations=REFERENCE_SAMPLES)
    return sample_in_chunks(engine, prompts, params, config.completions_per_step)


def reference_rewards(reward: Reward, groups: Sequence[RolloutGroup]) -> dict[str, Any]:
    """Mean and std of a trained judge's reward on the reference policy's own samples, not on dataset replies; how it goes with length."""
    scores = reward.score(groups)
    values = [value for row in scores for value in row if value is not None]
    return {
        "reference_mean": statistics.fmean(values) if values else None,
        "reference_std": statistics.pstdev(values) if values else None,
        "length_correlation_within": within_group_length_correlation(groups, scores),
    }


@dataclass(frozen=True)
class Scorers:
    """Who says what a reply is worth."""

    rewards: RewardStack
    witness: Reward | None = None
    gold: Gold | None = None
    lexical: Reward | None = None

    def score(self, groups: Sequence[RolloutGroup]) -> tuple[list[list[dict[str, float]]], tuple[str, ...]]:
        """Each completion's scores by name, of those who scored it; and what the rewards warn of."""
        stack, rows = self.rewards.score(groups), self.independent(groups)
        for rewards, row in zip(stack.rewards, rows, strict=True):
            for value, found in zip(rewards, row, strict=True):
                if value is not None:
                    found["reward"] = value
        return rows, stack.warnings

    def independent(self, groups: Sequence[RolloutGroup]) -> list[list[dict[str, float]]]:
        """The same of those alone that training does not see."""
        judged = {judge.name: judge.score(groups) for judge in (self.witness, self.lexical) if judge is not None}
        rows = []
        for n, group in enumerate(groups):
            row = []
            for g, completion in enumerate(group.completions):
                found = {name: value for name, scores in judged.items() if (value := scores[n][g]) is not None}
                if self.gold is not None:
                    found["gold"] = self.gold(group.prompt, completion.text)
                row.append(found)
            rows.append(row)
        return rows


def evaluate_policy(
    model: Gemma,
    engine: RolloutEngine,
    scorers: Scorers,
    prompts: Sequence[Prompt],
    config: GRPOConfig,
    *,
    judge: ZeroShotJudge | None = None,
) -> dict[str, Any]:
    """Before and after on the same prompts with the same random numbers; empty when there is nothing to evaluate on.

    `judge` is the zero-shot judge among the rewards, if any: its pass gives the reference's log-probabilities too.
    """
    chosen = prompts[: config.evaluation.num_prompts]
    if not chosen:
        return {}
    before, after = (evaluation_samples(engine, chosen, config, role) for role in _ROLES)
    with judge.keeping_logprobs(after, temperature=config.temperature) if judge is not None else nullcontext():
        return compare(model, scorers, chosen, (before, after), lambda: sequence_kl(model, after, config, judge=judge), config)


def measured_before(run: RunDirectory, result: Mapping[str, Any]) -> dict[str, Any]:
    """Baselines and tasks of an earlier evaluation, where it was of the same policy: its replies had the same rewards, to the bit."""
    path = run.path / "evaluation.json"
    earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    same = earlier.get("reward") == result.get("reward") and earlier.get("kl_sequence") == result.get("kl_sequence")
    return {name: earlier[name] for name in ("baselines", "tasks") if same and name in earlier}


def evaluate_refusals(engine: RolloutEngine, prompts: Sequence[Prompt], config: GRPOConfig, role: str = "policy") -> dict[str, Any]:
    """How many of the bundled look-alikes are refused, before and after: the metric refusal_looks_harmful; empty without any."""
    if not prompts:
        return {}
    before, after = (evaluation_samples(engine, prompts, config, one) for one in ("reference", role))
    return {"refusal_looks_harmful": refusals(before, after, seed=config.seed)}


def compare(
    model: Gemma,
    scorers: Scorers,
    prompts: Sequence[Prompt],
    samples: tuple[Sequence[RolloutGroup], Sequence[RolloutGroup]],
    kl: Callable[[], Sequence[Sequence[float]]],
    config: GRPOConfig,
) -> dict[str, Any]:
    """The content of evaluation.json for replies before and after, [N] groups of evaluation.num_completions each.

    `kl` gives the distance of each reply after to the reference, in nats; it is asked once the replies are scored.
    """
    before, after = samples
    (first, warned), (second, warned_too) = scorers.score(before), scorers.score(after)
    distances, preferred = kl(), _preferred(scorers, prompts, model)
    replies, skipped = [], 0
    for n, prompt in enumerate(prompts):
        for g in range(config.evaluation.num_completions):
            one = _evaluated(prompt, before[n].completions[g], after[n].completions[g], (first[n][g], second[n][g]), distances[n][g])
            if one is None:
                skipped += 1
                continue
            replies.append(replace(one, chosen=preferred.get(prompt.prompt_id)))
    told = {"unscored": skipped, "warnings": [*warned, *warned_too]}
    return {**summarise(replies, seed=config.seed), **told} if replies else told


def _evaluated(
    prompt: Prompt, before: Completion, after: Completion, scores: tuple[dict[str, float], dict[str, float]], kl: float
) -> EvaluatedReply | None:
    """None where a reply has no reward."""
    first, second = scores
    if "reward" not in first or "reward" not in second:
        return None
    gold, witness = ((first.get(name), second.get(name)) for name in ("gold", "witness"))
    return EvaluatedReply(
        prompt, before, after, first["reward"], second["reward"], *gold, kl, witness_before=witness[0], witness_after=witness[1]
    )


def _preferred(scorers: Scorers, prompts: Sequence[Prompt], model: Gemma) -> dict[str, dict[str, float]]:
    """By prompt, what the dataset's preferred reply is worth to those that training does not see, and its length."""
    found = chosen_replies(partial(reply_ids, model.tokenizer))([RolloutGroup(prompt, (), 0) for prompt in prompts])
    groups = [RolloutGroup(prompt, (reply,), 0) for prompt, reply in zip(prompts, found, strict=True) if reply is not None]
    return {
        group.prompt.prompt_id: {**row[0], "length": float(len(group.completions[0].token_ids))}
        for group, row in zip(groups, scorers.independent(groups), strict=True)
    }


def sample_in_chunks(engine: RolloutEngine, prompts: Sequence[Prompt], params: SamplingParams, rows: int) -> list[RolloutGroup]:
    """Sample any number of prompts with at most about `rows` completions at a time on each rank."""
    size = max(1, rows * distributed.world() // params.num_generations)
    return [group for start in range(0, len(prompts), size) for group in engine.sample(prompts[start : start + size], params)]


def evaluation_samples(engine: RolloutEngine, prompts: Sequence[Prompt], config: GRPOConfig, role: str) -> list[RolloutGroup]:
    """What the evaluation asks, answered under a role."""
    params = sampling_params(config, EVALUATION_STEP, role=role, num_generations=config.evaluation.num_completions)
    return sample_in_chunks(engine, prompts, params, config.completions_per_step)


def sequence_kl(
    model: Gemma, groups: Sequence[RolloutGroup], config: GRPOConfig, role: str = "policy", *, judge: ZeroShotJudge | None = None
) -> list[list[float]]:
    """Sum over each completion's tokens of log role - log reference."""
    batch = pad_rollouts(groups).to(model.device)
    policy = role_logprobs(model, batch, role, temperature=config.temperature)
    reference = reference_logprobs(model, groups, batch, judge, temperature=config.temperature)
    kl: list[list[float]] = (policy - reference).sum(-1).tolist()
    return kl
