"""What every rollout engine promises, and a fake one that keeps the promise without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from gemma_grpo.types import Completion, Prompt, RolloutGroup


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one rollout batch."""

    num_generations: int
    max_completion_length: int
    """Tokens at most, stop token included."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    step: int = 0
    """With the seed it decides every token; also the policy_step of the groups."""
    role: str = "policy"
    """Who answers: an adapter's name, or "reference"."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples groups. The same (seed, step, prompt_id, index) gives the same completion whatever else is in the batch."""

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[RolloutGroup]:
        """One group per prompt, in order."""
        ...


class FakeEngine:
    """A real implementation of the protocol for tests: completions come from a function, not from a model."""

    def __init__(self, reply: Callable[[Prompt, int, SamplingParams], Completion]) -> None:
        self.reply = reply

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[RolloutGroup]:
        """`reply(prompt, index, params)` for each completion."""
        return [
            RolloutGroup(prompt, tuple(self.reply(prompt, index, params) for index in range(params.num_generations)), params.step)
            for prompt in prompts
        ]
