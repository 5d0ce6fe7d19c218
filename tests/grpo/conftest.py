"""One training step on the small model, in pieces a test can hold: groups by hand, the step's batch, its gradient, a slow one beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import StopAt
from torch import Tensor

from gemma_grpo.config import GRPOConfig, LoraSettings, build_config
from gemma_grpo.data.batch import PolicyBatch
from gemma_grpo.data.prompts import build_prompts, parse_prompts
from gemma_grpo.grpo.step import policy_batch
from gemma_grpo.grpo.update import PolicyUpdater
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.reward.base import StackScores
from gemma_grpo.types import Completion, RolloutGroup

LIMIT = 6
LENGTHS = [[3, 6, 1], [5, 2, 4], [6, 6, 2], [1, 4, 5]]
REWARDS = [[0.1, 0.9, 0.4], [0.3, -0.5, 0.2], [1.2, 0.0, 0.7], [-0.3, 0.6, 0.5]]
END_OF_TURN = 106


@dataclass(frozen=True)
class StepWorld:
    """The small model with an adapter that already differs from the base, and four groups of three completions."""

    model: Gemma
    groups: tuple[RolloutGroup, ...]

    def config(self, **settings: Any) -> GRPOConfig:
        defaults: dict[str, Any] = {"batch_size": 2, "num_generations": 3, "max_completion_length": LIMIT, "planning_steps": 1}
        defaults |= {"learning_rate": 1e-2, "advantage.scale": "none", "optimizer.schedule": "constant", "optimizer.max_grad_norm": None}
        defaults |= {"kl.step_limit": None, "gradient_checkpointing": False}
        return build_config({**defaults, **settings})

    def updater(self, config: GRPOConfig, total_steps: int = 10) -> PolicyUpdater:
        return PolicyUpdater(self.model, config, total_steps)

    def batch(
        self, config: GRPOConfig, rewards: Sequence[Sequence[float]] = REWARDS, groups: Sequence[RolloutGroup] | None = None
    ) -> PolicyBatch:
        """What the step would learn from, made by the step's own function."""
        scores = StackScores([list(row) for row in rewards], {"given": [list(row) for row in rewards]})
        return policy_batch(self.model, groups or self.groups, scores, {"given": 1.0}, config, config.kl.beta)

    def gradient(self, config: GRPOConfig, batch: PolicyBatch) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Gradient of the whole step's loss by parameter, and the sums measured beside it."""
        updater = self.updater(config)
        gradient, sums, _ = updater._accumulate(batch)
        return dict(zip(updater.parameters, gradient, strict=True)), sums

    def plain_logprobs(self, batch: PolicyBatch, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [N G C] by transformers' own forward pass, one unpadded completion at a time."""
        logprobs, entropies = [], []
        for n, g in [(n, g) for n in range(batch.completion_ids.shape[0]) for g in range(batch.completion_ids.shape[1])]:
            prompt = batch.prompt_ids[n][batch.prompt_mask[n]]
            completion = batch.completion_ids[n, g][batch.completion_mask[n, g]]
            logits = self.model.causal_lm(input_ids=torch.cat([prompt, completion])[None]).logits[0].float() / temperature
            table = logits[len(prompt) - 1 : -1].log_softmax(-1)
            room = (0, batch.completion_ids.shape[-1] - len(completion))
            logprobs.append(torch.nn.functional.pad(table.gather(-1, completion[:, None])[:, 0], room))
            entropies.append(torch.nn.functional.pad(-(table.exp() * table).sum(-1), room))
        shape = batch.completion_ids.shape
        return torch.stack(logprobs).view(shape), torch.stack(entropies).view(shape)

    def plain_gradient(
        self, loss: Callable[[Tensor, Tensor], Tensor], batch: PolicyBatch, *, temperature: float = 1.0
    ) -> tuple[float, dict[str, Tensor]]:
        """Value and gradient of a loss(logprobs, entropies) written out by the test, through the plain forward pass."""
        parameters = self.model.adapter_parameters("policy")
        with self.model.role("policy", train=True):
            value = loss(*self.plain_logprobs(batch, temperature=temperature))
            gradients = torch.autograd.grad(value, list(parameters.values()))
        return float(value.detach()), dict(zip(parameters, gradients, strict=True))

    def weights(self) -> dict[str, Tensor]:
        """A copy of every weight: the base's and both adapters'."""
        return {name: value.detach().clone() for name, value in self.model.causal_lm.named_parameters()}


@pytest.fixture(scope="session")
def _loaded(small_model_dir: Path) -> tuple[Gemma, dict[str, Tensor]]:
    model = Gemma.load(str(small_model_dir), lora=LoraSettings(), precision="fp32")
    generator = torch.Generator().manual_seed(1)
    start = {}
    for name, parameter in model.adapter_parameters("policy").items():
        # both factors differ from 0, so that the policy is not the reference and both have a gradient
        start[name] = torch.randn(parameter.shape, generator=generator) * 0.05
    return model, start


@pytest.fixture
def world(_loaded: tuple[Gemma, dict[str, Tensor]]) -> StepWorld:
    """Fresh for every test: the adapter's weights are put back."""
    model, start = _loaded
    with torch.no_grad():
        for name, parameter in model.adapter_parameters("policy").items():
            parameter.copy_(start[name])
            parameter.grad = None
    rows = [{"prompt": text} for text in ("hello", "what is two and two?", "a", "tell me more, please")]
    prompts = build_prompts(parse_prompts(rows).prompts, model.tokenizer, 512).prompts
    generator = torch.Generator().manual_seed(2)
    groups = [
        RolloutGroup(prompt, tuple(completion(length, generator) for length in lengths), 0)
        for prompt, lengths in zip(prompts, LENGTHS, strict=True)
    ]
    return StepWorld(model, tuple(groups))


def completion(length: int, generator: torch.Generator) -> Completion:
    """Random tokens that end with the stop token below the limit; how likely the sampler found them is made up."""
    tokens = torch.randint(110, 363, (length,), generator=generator).tolist()
    if length < LIMIT:
        tokens[-1] = END_OF_TURN
    sampling = (-3 - torch.rand(length, generator=generator)).tolist()
    return Completion("text", tuple(tokens), tuple(sampling), "stop" if length < LIMIT else "length")


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest absolute difference, in units of the largest absolute entry of the second."""
    scale = max(float(value.abs().max()) for value in second.values())
    return max(float((first[name] - value).abs().max()) for name, value in second.items()) / scale


@pytest.fixture(scope="session")
def difference() -> Callable[[dict[str, Tensor], dict[str, Tensor]], float]:
    return largest_difference


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> StopAt:
    """Stops a run between any two pieces of work."""
    return StopAt(monkeypatch)
