"""A Gemma whose every continuation of at most two tokens can be enumerated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gemma_grpo.model.gemma import Gemma
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
