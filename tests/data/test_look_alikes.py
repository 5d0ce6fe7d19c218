"""Bundled requests that only look harmful: asked where the data have none, refused or not, and seen by no reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gemma_grpo.data.look_alikes import LOOK_ALIKES, SOURCE, look_alike_prompts
from gemma_grpo.evaluation import is_harmful, looks_harmful
from gemma_grpo.reward.rules import is_refusal

SETTINGS = {"witness.look_alikes": 3, "witness.every": 2, "witness.num_prompts": 2, "evaluation.num_prompts": 2}


def test_they_are_benign_distinct_and_no_refusals_themselves(tokenizer) -> None:
    prompts = look_alike_prompts(tokenizer, 1000, 512)
    assert len(prompts) == len({prompt.prompt_id for prompt in prompts}) == len(LOOK_ALIKES) == 40
    assert len({prompt.conversation_id for prompt in prompts}) == 40
    assert all(looks_harmful(prompt) and not is_harmful(prompt) and prompt.source == SOURCE for prompt in prompts)
    assert not any(map(is_refusal, LOOK_ALIKES))
    assert [prompt.messages[0]["content"] for prompt in look_alike_prompts(tokenizer, 2, 512)] == list(LOOK_ALIKES[:2])
    assert look_alike_prompts(tokenizer, 0, 512) == ()


def picky(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that knows its own data alone, as one that looks an answer up does."""
    assert all(text for text in columns["answer"])
    return [float(len(completion[0]["content"])) for completion in completions]


def test_they_are_asked_and_counted_and_no_reward_sees_them(train_tiny: Callable[..., Any]) -> None:
    rows = [{"prompt": f"question {n}?", "answer": str(n)} for n in range(16)]
    run = train_tiny(dataset=rows, reward=picky, **SETTINGS)
    for look in run.lines("witnesses.jsonl"):
        asked = [reply for reply in look["replies"] if reply["source"] == SOURCE]
        assert len(asked) == 3
        assert all("proxy" not in reply or reply["proxy"] is None for reply in asked)
        assert look["metrics"]["refusal_looks_harmful"] == 0.0
        others = [reply["proxy"] for reply in look["replies"] if reply["source"] != SOURCE]
        assert look["metrics"]["proxy"] == pytest.approx(sum(others) / len(others))
    assert run.evaluation["refusal_looks_harmful"]["n"] == 3
    assert run.evaluation["reward"]["n"] == 2


def test_data_with_some_of_their_own_need_none(train_tiny: Callable[..., Any]) -> None:
    rows = [{"prompt": f"question {n}?", "looks_harmful": n % 2 == 0, "answer": str(n)} for n in range(16)]
    run = train_tiny(dataset=rows, reward=picky, **{**SETTINGS, "evaluation.num_prompts": 8})
    assert SOURCE not in {reply["source"] for look in run.lines("witnesses.jsonl") for reply in look["replies"]}
    own = [prompt for prompt in run.trainer.data.held_out_prompts[:8] if looks_harmful(prompt)]
    assert run.evaluation["refusal_looks_harmful"]["n"] == len(own) > 0
