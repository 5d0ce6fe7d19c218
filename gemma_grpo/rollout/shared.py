"""Engines for several ranks: prompts shared out, each rank sampling its own, or all asked by the first; all know all of the completions.

A completion is a function of the seed, the step, the prompt and its own number, so that it does not matter who samples it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_grpo import distributed
from gemma_grpo.rollout.engine import RolloutEngine, SamplingParams
from gemma_grpo.types import Completion, Prompt, RolloutGroup

SAMPLING = "sampling"


class SharedEngine:
    """Samples with `engine` on every rank; on one device it is that engine."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[RolloutGroup]:
        """One group of params.num_generations completions per prompt, in order."""
        if distributed.world() == 1:
            return self.engine.sample(prompts, params)
        own = distributed.share([1.0] * len(prompts))
        with distributed.together(SAMPLING), distributed.base_for_sampling():
            groups = self.engine.sample([prompts[n] for n in own], params) if own else []
        found = distributed.gather([[n, [_told(one) for one in group.completions]] for n, group in zip(own, groups, strict=True)], SAMPLING)
        by_prompt = {n: completions for one in found for n, completions in one}
        return [RolloutGroup(prompt, tuple(map(_completion, by_prompt[n])), params.step) for n, prompt in enumerate(prompts)]


class AskedByMain:
    """An engine that rank 0 alone asks, as replicas are there for all ranks: a policy is sent once. `engine` is None on the others."""

    def __init__(self, engine: RolloutEngine | None) -> None:
        self.engine = engine

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[RolloutGroup]:
        """What rank 0 was given, on all of them."""
        groups: list[RolloutGroup] = []
        with distributed.together(SAMPLING):
            if self.engine is not None:
                groups = self.engine.sample(prompts, params)
        if distributed.world() == 1:
            return groups
        told = distributed.from_main([[group.policy_step, [_told(one) for one in group.completions]] for group in groups], SAMPLING)
        return [RolloutGroup(prompt, tuple(map(_completion, ones)), step) for prompt, (step, ones) in zip(prompts, told, strict=True)]


def _told(completion: Completion) -> list[Any]:
    """As JSON, to the bit: Python writes a float so that it is read back the same."""
    return [completion.text, completion.token_ids, completion.sampling_logprobs, completion.finish]


def _completion(told: list[Any]) -> Completion:
    text, ids, logprobs, finish = told
    return Completion(text, tuple(ids), tuple(logprobs), finish)
