"""The canary: what it measures, by hand and against the model itself, and which verdicts follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.rollout.canary import Gaps, gaps
from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.local import LocalEngine
from gemma_grpo.rollout.wire import Sampled
from gemma_grpo.types import Prompt


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (Gaps(policy=0.02, base=0.5, apart=0.5), None),
        (Gaps(policy=0.0, base=0.0, apart=0.0), None),  # a policy that is still the base
        (Gaps(policy=0.2, base=0.5, apart=0.5), r"disagrees .* 0\.2000 nats apart .* serving\.tolerance is 0\.1"),
        (Gaps(policy=0.5, base=0.01, apart=0.5), r"does not apply the adapter: .* 0\.5000 from? ?.*policy's and 0\.0100"),
        (Gaps(policy=0.02, base=0.001, apart=0.02), r"does not apply the adapter"),  # far below the tolerance
        (Gaps(policy=0.0005, base=0.0, apart=0.0005), None),  # nobody can tell
        (Gaps(policy=0.02, base=0.015, apart=0.01), None),  # rounding, no nearer to the one than to the other
        (Gaps(policy=float("nan"), base=0.0, apart=0.0), "disagrees"),
    ],
)
def test_verdicts(found: Gaps, fault: str | None) -> None:
    said = found.fault("policy", 0.1, 1.0)
    assert said is None if fault is None else said is not None
    if fault is not None:
        with pytest.raises(ValueError, match=fault.replace("from? ?.*", "nats from the ")):
            raise ValueError(said)


def test_the_base_itself_applies_no_adapter_and_a_temperature_is_named() -> None:
    said = Gaps(policy=0.3, base=0.3, apart=0.0).fault("reference", 0.1, 0.7)
    assert said is not None
    assert "--logprobs-mode processed_logprobs (temperature is 0.7)" in said
    assert "processed" not in str(Gaps(policy=0.3, base=0.3, apart=0.0).fault("reference", 0.1, 1.0))


@pytest.fixture(scope="module")
def model(small_model_dir: Path) -> Gemma:
    built = Gemma.load(str(small_model_dir), lora=LoraSettings(), precision="fp32")
    with torch.no_grad():
        for value in built.adapter_parameters("policy").values():
            value.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return built


def test_gaps_are_means_over_real_tokens_for_each_replica(model: Gemma, new_prompt: Callable[..., Prompt]) -> None:
    prompts = [new_prompt([2, 150, 160], "a"), new_prompt([2, 105, 200, 210, 220], "b")]

    def answers(role: str, seed: int, shift: float = 0.0) -> Sequence[Sampled]:
        """Of a replica whose log-probabilities are `shift` too low on the first prompt's tokens."""
        params = SamplingParams(1, 16, temperature=0.8, seed=seed, role=role)
        ones = [group.completions[0] for group in LocalEngine(model).sample(prompts, params)]
        lowered = [[value - shift * (n == 0) for value in one.sampling_logprobs] for n, one in enumerate(ones)]
        return [Sampled(one.token_ids, tuple(row), one.finish) for one, row in zip(ones, lowered, strict=True)]

    three = [answers("policy", 0), answers("policy", 1, shift=0.5), answers("reference", 2)]
    good, lower, base = gaps(model, "policy", prompts, three, temperature=0.8)
    assert good.policy < 1e-5
    assert good.base == pytest.approx(good.apart, abs=1e-5)
    assert good.apart > 0.01
    first, second = (len(one.token_ids) for one in three[1])
    assert first != second  # or a mean over prompts would be the same
    assert lower.policy == pytest.approx(0.5 * first / (first + second), abs=1e-5)
    assert base.base < 1e-5
    assert base.policy == pytest.approx(base.apart, abs=1e-5)
    assert good.fault("policy", 0.1, 0.8) is None
    assert "does not apply the adapter" in str(base.fault("policy", 10.0, 0.8))
