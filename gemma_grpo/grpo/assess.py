"""Measuring: the reward adapter on pairs it never saw, the policy on prompts it never saw. Numbers are made elsewhere.

Statistics are evaluation.py's and reward/quality.py's; this file runs the model for them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch

from gemma_grpo.config import GRPOConfig
from gemma_grpo.data.batch import pad_rollouts
from gemma_grpo.data.prompts import EncodedPair
from gemma_grpo.evaluation import EvaluatedReply, summarise
from gemma_grpo.grpo.setup import Gold
from gemma_grpo.grpo.step import reference_logprobs, role_logprobs, sampling_params
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.reward.base import RewardStack
from gemma_grpo.reward.canaries import canary_report, canary_warning
from gemma_grpo.reward.generative import GenerativeReward, Judge, score_pairs
from gemma_grpo.reward.quality import accuracy, quality_report
from gemma_grpo.reward.training import RewardTraining
from gemma_grpo.reward.zero_shot import ZeroShotJudge
from gemma_grpo.rollout.engine import RolloutEngine, SamplingParams
from gemma_grpo.types import Prompt, RolloutGroup

REFERENCE_PROMPTS = 64
EVALUATION_STEP = -1
"""Sampling counter of the evaluation: no training step draws the same numbers."""
_ROLES: tuple[Literal["reference"], Literal["policy"]] = ("reference", "policy")


def train_and_measure_reward(
    model: Gemma,
    engine: RolloutEngine,
    pairs: tuple[Sequence[EncodedPair], Sequence[EncodedPair]],
    prompts: Sequence[Prompt],
    config: GRPOConfig,
    *,
    gold: Callable[[EncodedPair], float] | None = None,
    run: Callable[[RewardTraining], None] = RewardTraining.run,
) -> dict[str, Any]:
    """Train the "reward" adapter on the first pairs and say how good it is on the second: the content of calibration.json.

    `run` makes the training's updates: who can save and go on gives another. `gold` gives a pair's true margin where it is known:
    accuracy against flipped labels cannot exceed 80 % in the miniature.
    """
    train, held_out = pairs
    judge = Judge(model)
    zero_shot = score_pairs(judge, held_out, "reference")
    run(RewardTraining(judge, train, config.reward_model, seed=config.seed))
    scores = score_pairs(judge, held_out, "reward")
    report = {"pairs_trained": len(train), **quality_report([pair.pair for pair in held_out], scores, zero_shot)}
    if gold is not None:
        true_margins = torch.tensor([gold(pair) for pair in held_out])
        report["accuracy_against_gold"] = accuracy((scores[:, 0] - scores[:, 1]) * true_margins.sign())
    report["canaries"] = canary_report(GenerativeReward(model).score, prompts, model.tokenizer)
    return report | reference_rewards(model, engine, prompts[:REFERENCE_PROMPTS], config)


def judge_warnings(
    run: RunDirectory, calibration: Mapping[str, Any], judge: ZeroShotJudge | None, prompts: Sequence[Prompt]
) -> list[str]:
    """What is to be said of the judges a run trains with: replies that fool them. The zero-shot judge's report is kept in run.json."""
    reports = {GenerativeReward.name: calibration.get("canaries", {})}
    if judge is not None:
        report = run.read_run().get("canaries") or canary_report(judge.score, prompts, judge.judge.model.tokenizer)
        run.update_run(canaries=report)
        reports[judge.name] = report
    return [text for name, report in reports.items() if (text := canary_warning(name, report)) is not None]


def reference_rewards(model: Gemma, engine: RolloutEngine, prompts: Sequence[Prompt], config: GRPOConfig) -> dict[str, float | None]:
    """Mean and std of the trained judge's reward on the reference policy's own samples, not on dataset replies."""
    groups = sample_in_chunks(
        engine, prompts, sampling_params(config, EVALUATION_STEP, role="reference", num_generations=1), config.completions_per_step
    )
    values = [value for row in GenerativeReward(model).score(groups) for value in row if value is not None]
    return {
        "reference_mean": statistics.fmean(values) if values else None,
        "reference_std": statistics.pstdev(values) if values else None,
    }


def evaluate_policy(
    model: Gemma,
    engine: RolloutEngine,
    rewards: RewardStack,
    prompts: Sequence[Prompt],
    config: GRPOConfig,
    gold: Gold | None,
    *,
    judge: ZeroShotJudge | None = None,
) -> dict[str, Any]:
    """Before and after on the same prompts with the same random numbers; empty when there is nothing to evaluate on.

    `judge` is the zero-shot judge among the rewards, if any: its pass gives the reference's log-probabilities too.
    """
    chosen = prompts[: config.evaluation.num_prompts]
    if not chosen:
        return {}
    before, after = (_evaluation_samples(engine, chosen, config, role) for role in _ROLES)
    with judge.keeping_logprobs(after, temperature=config.temperature) if judge is not None else nullcontext():
        stacks = [rewards.score(groups) for groups in (before, after)]
        kl = _sequence_kl(model, after, config, judge)
    replies, skipped, scores = [], 0, [stack.rewards for stack in stacks]
    for n, prompt in enumerate(chosen):
        for g in range(config.evaluation.num_completions):
            first, second = scores[0][n][g], scores[1][n][g]
            if first is None or second is None:
                skipped += 1
                continue
            pair = before[n].completions[g], after[n].completions[g]
            golds = [None if gold is None else gold(prompt, completion.text) for completion in pair]
            replies.append(EvaluatedReply(prompt, *pair, first, second, golds[0], golds[1], kl[n][g]))
    told = {"unscored": skipped, "warnings": [text for stack in stacks for text in stack.warnings]}
    return {**summarise(replies, seed=config.seed), **told} if replies else told


def sample_in_chunks(engine: RolloutEngine, prompts: Sequence[Prompt], params: SamplingParams, rows: int) -> list[RolloutGroup]:
    """Sample any number of prompts with at most about `rows` completions at a time."""
    size = max(1, rows // params.num_generations)
    return [group for start in range(0, len(prompts), size) for group in engine.sample(prompts[start : start + size], params)]


def _evaluation_samples(
    engine: RolloutEngine, prompts: Sequence[Prompt], config: GRPOConfig, role: Literal["policy", "reference"]
) -> list[RolloutGroup]:
    params = sampling_params(config, EVALUATION_STEP, role=role, num_generations=config.evaluation.num_completions)
    return sample_in_chunks(engine, prompts, params, config.completions_per_step)


def _sequence_kl(model: Gemma, groups: Sequence[RolloutGroup], config: GRPOConfig, judge: ZeroShotJudge | None) -> list[list[float]]:
    """Sum over each completion's tokens of log policy - log reference."""
    batch = pad_rollouts(groups).to(model.device)
    policy = role_logprobs(model, batch, "policy", temperature=config.temperature)
    reference = reference_logprobs(model, groups, batch, judge, temperature=config.temperature)
    kl: list[list[float]] = (policy - reference).sum(-1).tolist()
    return kl
