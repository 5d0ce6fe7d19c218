"""A step under way: what it has so far, and the same as tensors, so that a run that was stopped inside a step goes on inside it.

Owns the content of a checkpoint's rollout.safetensors. What is sampled, scored and learned is step.py's and update.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gemma_grpo.data.batch import PolicyBatch, pad_rollouts, pad_values
from gemma_grpo.data.chat import reply_text
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.reward.base import Scores, StackScores
from gemma_grpo.types import Completion, Prompt, RolloutGroup


@dataclass(frozen=True)
class PassesMade:
    """An update between two of its planning passes.

    The weights and the optimizer that belong to it are those before the last pass, which the next one may still take back: going on
    makes that pass again from its gradient.
    """

    count: int
    """Passes made, the last one included."""
    gradient: Sequence[Tensor]
    """Of the last pass, by parameter, clipped."""
    old_logprobs: Tensor
    """[N G C], of the first pass."""
    numbers: Mapping[str, float]
    """rate, the last pass's learning rate; grad_norm, of its gradient before clipping; kl_step, to the policy that sampled."""
    first: Mapping[str, float]
    """Sums of what the first pass measured, by name."""
    last: Mapping[str, float]
    """The same of the last pass."""

    def with_numbers(self, **numbers: float) -> PassesMade:
        """The same with some of its numbers set."""
        return replace(self, numbers={**self.numbers, **numbers})


@dataclass(frozen=True)
class StepUnderWay:
    """What a step has so far: its rollout, then scores and batch, then some of its update's passes."""

    groups: Sequence[RolloutGroup]
    scores: StackScores | None = None
    batch: PolicyBatch | None = None
    """There with the scores, or not yet."""
    passes: PassesMade | None = None


def rollout_batch(groups: Sequence[RolloutGroup], advantages: Tensor, ref_logprobs: Tensor | None) -> PolicyBatch:
    """The batch of a rollout, on the advantages' device."""
    batch = pad_rollouts(groups).to(advantages.device)
    values = [[completion.sampling_logprobs for completion in group.completions] for group in groups]
    sampling = pad_values(values, batch).to(advantages.device)
    return PolicyBatch(**vars(batch), sampling_logprobs=sampling, advantages=advantages, old_logprobs=None, ref_logprobs=ref_logprobs)


# ---- as tensors


def to_tensors(under_way: StepUnderWay, model: Gemma) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The step as tensors, and what a tensor cannot hold as JSON values."""
    groups = under_way.groups
    batch = pad_rollouts(groups)
    sampled = [[completion.sampling_logprobs for completion in group.completions] for group in groups]
    stopped = [[completion.finish == "stop" for completion in group.completions] for group in groups]
    tensors = {
        "completion_ids": batch.completion_ids,
        "completion_lengths": batch.completion_mask.sum(-1),
        "sampling_logprobs": pad_values(sampled, batch),
        "stopped": torch.tensor(stopped),
    }
    facts: dict[str, Any] = {"prompts": [group.prompt.prompt_id for group in groups]}
    facts["policy_steps"] = [group.policy_step for group in groups]
    if under_way.scores is not None and under_way.batch is not None:
        tensors |= _scored_tensors(under_way.scores, under_way.batch)
        facts |= {"parts": list(under_way.scores.parts), "skipped": dict(under_way.scores.skipped)}
        facts["warnings"] = list(under_way.scores.warnings)
    if under_way.passes is not None:
        made = under_way.passes
        names = model.adapter_parameters("policy")
        tensors |= {f"gradient/{name}": part for name, part in zip(names, made.gradient, strict=True)}
        tensors["old_logprobs"] = made.old_logprobs
        # as hex: exact, and JSON has no NaN
        facts["passes"] = {part: {name: float(value).hex() for name, value in getattr(made, part).items()} for part in _NUMBERS}
        facts["count"] = made.count
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, facts


_NUMBERS = ("numbers", "first", "last")


def from_tensors(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], prompts: Sequence[Prompt], model: Gemma, *, step: int
) -> StepUnderWay:
    """What to_tensors was given; `prompts` are the step's. Raises ValueError when the rollout was sampled for others."""
    if list(facts["prompts"]) != [prompt.prompt_id for prompt in prompts]:
        raise ValueError(
            f"the rollout kept for step {step + 1} was sampled for other prompts than this run has there. "
            "Restore the data it began with, or start a new run in another output_dir."
        )
    groups, device = _groups(tensors, prompts, model, facts.get("policy_steps", [step] * len(prompts))), model.device
    under_way = StepUnderWay(groups)
    if "parts" in facts:
        parts = _parts(tensors["parts"], facts["parts"])
        scores = StackScores(_unscored_as_none(tensors["rewards"]), parts, facts["skipped"], tuple(facts["warnings"]))
        ref = tensors.get("ref_logprobs")
        batch = rollout_batch(groups, tensors["advantages"].to(device), None if ref is None else ref.to(device))
        under_way = replace(under_way, scores=scores, batch=batch)
    if "passes" in facts:
        numbers = {part: {name: float.fromhex(text) for name, text in facts["passes"][part].items()} for part in _NUMBERS}
        gradient = [tensors[f"gradient/{name}"].to(device) for name in model.adapter_parameters("policy")]
        passes = PassesMade(int(facts["count"]), gradient, tensors["old_logprobs"].to(device), **numbers)
        under_way = replace(under_way, passes=passes)
    return under_way


def _scored_tensors(scores: StackScores, batch: PolicyBatch) -> dict[str, Tensor]:
    tensors = {"rewards": _as_float64(scores.rewards), "advantages": batch.advantages}
    tensors["parts"] = torch.stack([_as_float64(part) for part in scores.parts.values()])
    return tensors if batch.ref_logprobs is None else {**tensors, "ref_logprobs": batch.ref_logprobs}


def _as_float64(scores: Scores) -> Tensor:
    """[N G] of Python floats to the bit, NaN where a completion was not scored: no score is NaN itself (reward/base.py)."""
    return torch.tensor([[float("nan") if value is None else value for value in row] for row in scores], dtype=torch.float64)


def _unscored_as_none(values: Tensor) -> Scores:
    return [[None if value != value else value for value in row] for row in values.tolist()]


def _parts(values: Tensor, names: Sequence[str]) -> dict[str, Scores]:
    return {name: _unscored_as_none(part) for name, part in zip(names, values, strict=True)}


def _groups(tensors: Mapping[str, Tensor], prompts: Sequence[Prompt], model: Gemma, steps: Sequence[int]) -> list[RolloutGroup]:
    columns = ("completion_ids", "completion_lengths", "sampling_logprobs", "stopped")
    rows = zip(prompts, steps, *(tensors[name].tolist() for name in columns), strict=True)
    return [
        RolloutGroup(prompt, tuple(_completion(*one, model) for one in zip(ids, lengths, logprobs, stopped, strict=True)), step)
        for prompt, step, ids, lengths, logprobs, stopped in rows
    ]


def _completion(ids: Sequence[int], length: int, logprobs: Sequence[float], stopped: bool, model: Gemma) -> Completion:
    tokens = tuple(ids[:length])
    return Completion(reply_text(model.tokenizer, tokens), tokens, tuple(logprobs[:length]), "stop" if stopped else "length")
