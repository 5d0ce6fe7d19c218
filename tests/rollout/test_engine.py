"""The fake engine keeps the protocol's promise."""

from __future__ import annotations

from collections.abc import Callable

from gemma_grpo.rollout.engine import FakeEngine, RolloutEngine, SamplingParams
from gemma_grpo.types import Completion, Prompt


def test_the_fake_engine_asks_its_function_for_each_completion_in_order(new_prompt: Callable[..., Prompt]) -> None:
    def reply(prompt: Prompt, index: int, params: SamplingParams) -> Completion:
        return Completion(f"{prompt.prompt_id}{index}", (150 + index, 106), (-1.0, -2.0), "stop")

    engine = FakeEngine(reply)
    assert isinstance(engine, RolloutEngine)
    prompts = [new_prompt([2, 5], "a"), new_prompt([2, 6], "b")]
    groups = engine.sample(prompts, SamplingParams(num_generations=2, max_completion_length=4, step=9))
    assert [group.prompt for group in groups] == prompts
    assert [[completion.text for completion in group.completions] for group in groups] == [["a0", "a1"], ["b0", "b1"]]
    assert [group.policy_step for group in groups] == [9, 9]
    assert engine.sample([], SamplingParams(2, 4)) == []
