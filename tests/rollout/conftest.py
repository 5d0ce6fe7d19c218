"""A Gemma whose every continuation of at most two tokens can be enumerated; replicas that serve, and an engine that asks them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import FakeVllm, Told, new_replica, serving

from gemma_grpo.config.machine import ServingSettings
from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.rollout.vllm import ServedEngine
from gemma_grpo.types import Prompt


@pytest.fixture(scope="session")
def six_words(new_gemma: Callable[..., Gemma]) -> Gemma:
    """Vocabulary 6, of which 1 ends a reply; an untied head wide enough that some continuations are far likelier than others."""
    model = new_gemma(
        vocab_size=6,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=4,
        tie_word_embeddings=False,
        bos_token_id=2,
    )
    with torch.no_grad():
        model.causal_lm.lm_head.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(4))
    return model


@pytest.fixture(scope="session")
def new_prompt() -> Callable[..., Prompt]:
    def build(token_ids: list[int], prompt_id: str = "p") -> Prompt:
        return Prompt(prompt_id, "test", ({"role": "user", "content": "x"},), tuple(token_ids), "conversation")

    return build


@pytest.fixture(scope="session")
def _learner(small_model_dir: Path) -> Gemma:
    return Gemma.load(str(small_model_dir), lora=LoraSettings(), precision="fp32")


@pytest.fixture
def learner(_learner: Gemma) -> Gemma:
    """Policy and reward well away from the base, the same for every test."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for role in ("policy", "reward"):
            for value in _learner.adapter_parameters(role).values():
                value.normal_(std=0.1, generator=generator)
    return _learner


@pytest.fixture(scope="session")
def _models(small_model_dir: Path) -> list[FakeVllm]:
    return [new_replica(small_model_dir), new_replica(small_model_dir)]


@pytest.fixture
def replicas(_models: list[FakeVllm]) -> Iterator[list[FakeVllm]]:
    """Two that answer."""
    with ExitStack() as stack:
        yield [stack.enter_context(serving(FakeVllm(one.model, one.name, lock=one.lock))) for one in _models]
    for one in _models:
        for name in set(one.model.peft.peft_config) - {"policy", "reward"}:
            one.forget(name)


@pytest.fixture
def new_engine(learner: Gemma, replicas: list[FakeVllm], tmp_path: Path) -> Iterator[Callable[..., ServedEngine]]:
    made: list[ServedEngine] = []

    def build(
        *, urls: Sequence[str] | None = None, told: Told | None = None, upcoming: Any = lambda step: (), **settings: Any
    ) -> ServedEngine:
        given = ServingSettings(urls=tuple(urls or [one.url for one in replicas]), **{"timeout_seconds": 60.0, **settings})
        made.append(ServedEngine(learner, given, lambda: tmp_path / "serving", report=Told() if told is None else told, upcoming=upcoming))
        return made[-1]

    yield build
    for one in made:
        one.close()


@pytest.fixture
def six_prompts(new_prompt: Callable[..., Prompt]) -> list[Prompt]:
    rows = [torch.randint(110, 363, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 12, 5, 9, 7, 4)]
    return [new_prompt([2, *row], f"prompt {n}") for n, row in enumerate(rows)]
