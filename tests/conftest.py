"""Fixtures every test shares: a tiny Gemma 3 with Gemma's control ids, saved to disk and loaded as any checkpoint is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

# every shape annotation of the public tensor functions is checked while the tests run
CHECKED_MODULES = [
    "gemma_grpo.data.batch",
    "gemma_grpo.grpo.advantages",
    "gemma_grpo.grpo.loss",
    "gemma_grpo.grpo.step",
    "gemma_grpo.model.attention",
    "gemma_grpo.model.logprobs",
    "gemma_grpo.model.precision",
    "gemma_grpo.reward.generative",
    "gemma_grpo.reward.quality",
    "gemma_grpo.rollout.sampling",
]
install_import_hook(CHECKED_MODULES, "beartype.beartype")

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Gemma's control ids, a newline at 107, and one token per byte."""
    controls = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<unused{i}>" for i in range(100)), "<start_of_turn>", "<end_of_turn>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = "Ċ"
    vocabulary = {token: index for index, token in enumerate([*controls, newline, *(c for c in alphabet if c != newline)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def tiny_config(**changes: object) -> Gemma3TextConfig:
    """Two thousand times smaller than the smallest Gemma 3, of the same architecture; a window short enough to be crossed."""
    settings: dict[str, object] = {
        "vocab_size": 363,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "max_position_embeddings": 2048,
    }
    return Gemma3TextConfig(**{**settings, **changes})


def random_gemma(config: Gemma3TextConfig, seed: int = 0, spread: float = 0.15) -> Gemma3ForCausalLM:
    """Random weights large enough that attention and window matter."""
    torch.manual_seed(seed)
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=spread)
    return model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder as a hub download leaves it."""
    folder = tmp_path_factory.mktemp("tiny-gemma3")
    random_gemma(tiny_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
