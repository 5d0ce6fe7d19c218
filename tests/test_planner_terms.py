"""What the planner says the code holds, against what the code holds: live tensors counted operation by operation."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes

from gemma_grpo.config import GRPOConfig, LoraSettings, build_config
from gemma_grpo.data.batch import GroupBatch, pad_groups
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.logprobs import completion_logprobs
from gemma_grpo.planner.phases import ACTIVATIONS, GLOBAL_KV, LOGITS, SLIDING_KV, Phase, Run
from gemma_grpo.planner.terms import Numbers
from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.local import LocalEngine
from gemma_grpo.shapes import ModelShape
from gemma_grpo.types import Prompt

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 6}
NARROW = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 2}

MANY_KEYS = {**NARROW, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 32}


def run_of(model: Gemma, kind: str, **settings: Any) -> Run:
    config, text = build_config(settings), model.config
    shape = ModelShape(
        *("measured", text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads, text.head_dim),
        *(text.intermediate_size, text.vocab_size, text.sliding_window, text.layer_types.count("full_attention")),
    )
    return Run(config, shape, Numbers(kind, nf4=False, on_cuda=False), frozenset({"generative"}))  # type: ignore[arg-type]


def tokens_of(config: GRPOConfig, prompts: int) -> int:
    return prompts * (config.max_prompt_length + config.num_generations * config.max_completion_length)


def full_batch(config: GRPOConfig, prompts: int, vocabulary: int) -> GroupBatch:
    """Groups in which every sequence is as long as it may be."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    groups = [[words(config.max_completion_length) for _ in range(config.num_generations)] for _ in range(prompts)]
    return pad_groups([words(config.max_prompt_length) for _ in range(prompts)], groups)


def measured(model: Gemma, batch: GroupBatch | None, work: Callable[[], object]) -> int:
    """The most that `work` holds beside the model and the batch."""
    gc.collect()
    known = [*model.causal_lm.parameters(), *model.causal_lm.buffers(), *(vars(batch).values() if batch else ())]
    with LiveBytes(known) as live:
        work()
    return live.peak


def learning(model: Gemma, batch: GroupBatch) -> Callable[[], object]:
    """One piece of an update, as grpo/update.py does it."""

    def work() -> None:
        with model.role("policy", train=True):
            logprobs, entropy = completion_logprobs(model, batch)
            (logprobs.sum() + entropy.sum()).backward()

    return work


@pytest.fixture
def clean() -> Iterator[list[Gemma]]:
    """Models whose gradients are dropped afterwards."""
    models: list[Gemma] = []
    yield models
    for model in models:
        for parameter in model.causal_lm.parameters():
            parameter.grad = None


def beside_weights(phase: Phase) -> int:
    return phase.parts[ACTIVATIONS] + phase.parts[LOGITS] + phase.parts[SLIDING_KV] + phase.parts[GLOBAL_KV]


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("intermediate", "modules", "dropout", "lengths"),
    [
        (1024, ("q_proj", "v_proj"), 0.0, (32, 4, 32)),
        (1024, ("q_proj", "v_proj"), 0.0, (96, 8, 6)),
        (512, ("q_proj", "v_proj"), 0.0, (64, 8, 2)),
        (2048, ALL, 0.0, (32, 4, 32)),
        (2048, ("down_proj",), 0.0, (16, 2, 64)),
        (2048, ("o_proj", "gate_proj"), 0.0, (32, 4, 32)),
        (1024, ("q_proj", "v_proj"), 0.1, (32, 4, 32)),
    ],
)
def test_an_update_holds_what_is_planned(
    new_gemma, clean, kind: str, checkpointing: bool, intermediate: int, modules: Any, dropout: float, lengths: tuple[int, int, int]
) -> None:
    lora = LoraSettings(target_modules=modules, dropout=dropout)
    model = new_gemma(dtype=DTYPES[kind], lora=lora, intermediate_size=intermediate, moved=0.01, **WIDE)
    clean.append(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    names = ("max_prompt_length", "num_generations", "max_completion_length")
    settings = {**dict(zip(names, lengths, strict=True)), "gradient_checkpointing": checkpointing, "lora": lora.model_dump()}
    run = run_of(model, kind, **settings)
    batch = full_batch(run.config, 2, 363)
    planned, held = beside_weights(run.update(tokens_of(run.config, 2))), measured(model, batch, learning(model, batch))
    # without checkpoints the first of the six layers, whose input needs no gradient, keeps less
    least = 0.95 if checkpointing else 0.95 * (1 - 1 / 6)
    assert least * planned < held < 1.05 * planned


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [100, 340, 600])
def test_logits_are_held_a_chunk_at_a_time(new_gemma, clean, kind: str, tokens: int) -> None:
    model = new_gemma(dtype=DTYPES[kind], vocab_size=12_000, intermediate_size=32, **NARROW)
    clean.append(model)
    model.enable_gradient_checkpointing()
    run = run_of(model, kind, max_prompt_length=8, num_generations=2, max_completion_length=tokens // 2)
    batch = full_batch(run.config, 1, 12_000)
    update, reference = run.update(tokens_of(run.config, 1)), run.reference(tokens_of(run.config, 1))
    assert update.parts[LOGITS] > 20 * update.parts[ACTIVATIONS]
    assert beside_weights(update) == pytest.approx(measured(model, batch, learning(model, batch)), rel=0.06)

    def scoring() -> None:
        with model.role("reference"), torch.no_grad():
            completion_logprobs(model, batch)

    assert beside_weights(reference) == pytest.approx(measured(model, batch, scoring), rel=0.03)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("lengths", [(32, 4, 32), (96, 8, 4), (16, 2, 100)])
def test_reading_without_gradients_holds_what_is_planned(new_gemma, kind: str, lengths: tuple[int, int, int]) -> None:
    model = new_gemma(dtype=DTYPES[kind], intermediate_size=1024, **WIDE)
    names = ("max_prompt_length", "num_generations", "max_completion_length")
    run = run_of(model, kind, **dict(zip(names, lengths, strict=True)))
    batch = full_batch(run.config, 2, 363)

    def reading() -> None:
        with model.role("policy"), torch.no_grad():
            completion_logprobs(model, batch)

    planned = beside_weights(run.reference(tokens_of(run.config, 2)))
    assert planned == pytest.approx(measured(model, batch, reading), rel=0.06)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("sizes", "lengths", "prompts", "filters"),
    [
        (MANY_KEYS, (8, 8, 40), 4, {}),  # keys and values
        (MANY_KEYS, (8, 8, 40), 4, {"kv_tokens": 700}),  # two prompts at a time
        ({**NARROW, "intermediate_size": 32, "vocab_size": 20_000}, (8, 4, 4), 8, {}),  # the vocabulary
        ({**NARROW, "intermediate_size": 32, "vocab_size": 20_000}, (8, 4, 4), 8, {"top_k": 5}),
        ({**NARROW, "intermediate_size": 32, "vocab_size": 20_000}, (8, 4, 4), 8, {"top_p": 0.9}),
        ({**WIDE, "intermediate_size": 2048}, (256, 2, 2), 4, {}),  # the prompts
    ],
)
def test_a_rollout_holds_what_is_planned(
    new_gemma, kind: str, sizes: dict[str, int], lengths: tuple[int, int, int], prompts: int, filters: dict[str, Any]
) -> None:
    model = new_gemma(dtype=DTYPES[kind], **sizes)
    names = ("max_prompt_length", "num_generations", "max_completion_length")
    sampling = {key: value for key, value in filters.items() if key != "kv_tokens"}
    settings = {**dict(zip(names, lengths, strict=True)), "sampling": sampling}
    run = run_of(model, kind, **settings, batch_size=prompts, gradient_accumulation_steps=1)
    config = run.config
    batch = full_batch(config, prompts, model.config.vocab_size)
    items = [Prompt(str(n), "test", (), tuple(ids), "c") for n, ids in enumerate(batch.prompt_ids.tolist())]
    params = SamplingParams(config.num_generations, config.max_completion_length, **sampling)
    budget = filters.get("kv_tokens", tokens_of(config, prompts))
    engine = LocalEngine(model, budget, stop_ids=(-1,))
    # two whole prompts of four fit in 700 tokens, of 328 each
    used = 2 * (8 + 8 * 40) if "kv_tokens" in filters else budget
    planned = beside_weights(run.rollout(used))
    assert planned == pytest.approx(measured(model, None, lambda: engine.sample(items, params)), rel=0.06)
