"""What the planner says the code holds, against what the code holds: live tensors counted operation by operation."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes

from gemma_grpo.config import GRPOConfig, LoraSettings, build_config
from gemma_grpo.data.batch import GroupBatch, pad_groups
from gemma_grpo.grpo.step import sampling_params
from gemma_grpo.model.decode import decode_cache
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.grouped import BLOCK_SCORES, TOGETHER
from gemma_grpo.model.logprobs import TILE, completion_logprobs
from gemma_grpo.model.memory import TokenBudget
from gemma_grpo.planner import attention, sampling, terms
from gemma_grpo.planner.phases import ACTIVATIONS, GLOBAL_KV, JUDGE_TOKENS, LOGITS, SLIDING_KV, Budgets, Phase, Run
from gemma_grpo.planner.terms import Numbers
from gemma_grpo.reward.zero_shot import ZeroShotJudge
from gemma_grpo.rollout.local import EVERY_TOKEN, IN_BURSTS, LocalEngine, Pace
from gemma_grpo.rollout.sampling import BLOCK
from gemma_grpo.shapes import ModelShape
from gemma_grpo.types import Completion, Prompt, RolloutGroup

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 6}
NARROW = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 2}

BOTH_KINDS = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
MANY_KEYS = {**NARROW, **BOTH_KINDS, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 32}
WIDE_WINDOW, NARROW_WINDOW = {**MANY_KEYS, "sliding_window": 64}, {**MANY_KEYS, "sliding_window": 16}
MANY_WORDS = {**NARROW, "intermediate_size": 32, "vocab_size": 20_000}
OFTEN = tuple(range(3, 24))
"""So many words end a completion that most end early."""


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


UPDATES = [
    (1024, ("q_proj", "v_proj"), 0.0, (32, 4, 32)),
    (1024, ("q_proj", "v_proj"), 0.0, (96, 8, 6)),
    (512, ("q_proj", "v_proj"), 0.0, (64, 8, 2)),
    (2048, ALL, 0.0, (32, 4, 32)),
    (2048, ("down_proj",), 0.0, (16, 2, 64)),
    (2048, ("o_proj", "gate_proj"), 0.0, (32, 4, 32)),
    (1024, ("q_proj", "v_proj"), 0.1, (32, 4, 32)),
    (64, ("q_proj", "v_proj"), 0.0, (64, 4, 128)),  # scores: a group's in one block
    (64, ("q_proj", "v_proj"), 0.0, (200, 3, 400)),  # two completions' in one block
    (64, ("q_proj", "v_proj"), 0.0, (100, 2, 800)),  # half a completion's
    (64, ("q_proj", "v_proj"), 0.0, (800, 2, 8)),  # half a prompt's
]
"""intermediate_size, LoRA's modules, dropout, lengths"""


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    ("kind", "intermediate", "modules", "dropout", "lengths"),
    [
        *(pytest.param("fp32", *row) for row in UPDATES),
        # a CPU is slow at bf16
        *(pytest.param("bf16", *row, marks=pytest.mark.slow if row[0] in (64, 2048) else ()) for row in UPDATES),
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
def test_an_update_of_many_heads_holds_what_is_planned(new_gemma, clean, kind: str) -> None:
    model = new_gemma(dtype=DTYPES[kind], intermediate_size=64, moved=0.01, **{**WIDE, "num_attention_heads": 16})
    clean.append(model)
    model.enable_gradient_checkpointing()
    run = run_of(model, kind, max_prompt_length=32, num_generations=4, max_completion_length=32)
    batch = full_batch(run.config, 2, 363)
    planned, held = beside_weights(run.update(tokens_of(run.config, 2))), measured(model, batch, learning(model, batch))
    assert held == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [100, 340, 600])
def test_logits_are_held_a_tile_at_a_time(new_gemma, clean, kind: str, tokens: int) -> None:
    model = new_gemma(dtype=DTYPES[kind], vocab_size=12_000, intermediate_size=32, **NARROW)
    clean.append(model)
    model.enable_gradient_checkpointing()
    run = run_of(model, kind, max_prompt_length=8, num_generations=2, max_completion_length=tokens // 2)
    batch = full_batch(run.config, 1, 12_000)
    update, reference = run.update(tokens_of(run.config, 1)), run.reference(tokens_of(run.config, 1))
    assert update.parts[LOGITS] > 10 * update.parts[ACTIVATIONS]
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
@pytest.mark.parametrize("vocabulary", [363, 12_000])
@pytest.mark.parametrize("shaping", ["none", "par"])
def test_judging_with_log_probabilities_holds_what_is_planned(new_gemma, kind: str, vocabulary: int, shaping: str) -> None:
    model = new_gemma(dtype=DTYPES[kind], intermediate_size=1024, vocab_size=vocabulary, **WIDE)
    judge, length = ZeroShotJudge(model), 40
    # this tokenizer's question has more tokens than any of Gemma's, for which the plan has room: planned as longer completions
    planned_length = length + len(judge.judge.suffix) - JUDGE_TOKENS
    lengths = {"max_prompt_length": 32, "num_generations": 4, "max_completion_length": planned_length}
    run = run_of(model, kind, **lengths, **{"reward_model.shaping": shaping}, batch_size=2, gradient_accumulation_steps=1)
    run = replace(run, rewards=frozenset({"judge"}))
    group = 4 + (shaping == "par")
    batch = full_batch(build_config({**lengths, "num_generations": group, "max_completion_length": length}), 2, 363)
    groups = [
        RolloutGroup(Prompt("p", "test", (), tuple(prompt), "c"), tuple(Completion("", tuple(ids), (), "length") for ids in rows), 0)
        for prompt, rows in zip(batch.prompt_ids.tolist(), batch.completion_ids.tolist(), strict=True)
    ]

    def judging() -> None:
        with judge.keeping_logprobs([replace(one, completions=one.completions[:4]) for one in groups], temperature=1.0):
            judge.score(groups)

    planned, held = beside_weights(run.reward(10_000)), measured(model, None, judging)
    assert 0.9 * planned < held < 1.07 * planned


def rollout(model: Gemma, run: Run, *, kv_tokens: int, stop_ids: tuple[int, ...] = (-1,), pace: Pace | None = None) -> Callable[[], object]:
    """Sampling one step's prompts, each as long as it may be."""
    config = run.config
    batch = full_batch(config, config.prompts_per_step, model.config.vocab_size)
    items = [Prompt(str(n), "test", (), tuple(ids), "c") for n, ids in enumerate(batch.prompt_ids.tolist())]
    engine = LocalEngine(model, kv_tokens, stop_ids=stop_ids, pace=pace)
    model.budget = TokenBudget(config.memory.token_budget)
    return lambda: engine.sample(items, sampling_params(config, 0))


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("sizes", "lengths", "prompts", "settings"),
    [
        (WIDE_WINDOW, (8, 8, 40), 4, {}),  # keys and values
        (WIDE_WINDOW, (8, 8, 40), 4, {"kv_token_budget": 700}),  # two prompts at a time
        (WIDE_WINDOW, (8, 8, 40), 4, {"kv_token_budget": 680}),  # two and room for a third
        (WIDE_WINDOW, (8, 8, 64), 2, {"kv_token_budget": 260}),  # three completions of one
        (NARROW_WINDOW, (40, 4, 64), 6, {}),  # keys and values, fewer in sliding layers
        (NARROW_WINDOW, (40, 4, 64), 6, {"kv_token_budget": 900}),
        (MANY_WORDS, (8, 4, 4), 8, {}),  # the vocabulary
        (MANY_WORDS, (8, 4, 4), 8, {"temperature": 0.7}),
        (MANY_WORDS, (8, 4, 4), 8, {"top_k": 5}),
        (MANY_WORDS, (8, 4, 4), 8, {"top_p": 0.9}),
        (MANY_WORDS, (8, 4, 4), 8, {"top_k": 50, "top_p": 0.9, "temperature": 0.7}),
        ({**WIDE, "intermediate_size": 2048}, (256, 2, 2), 4, {}),  # the prompts
        ({**WIDE, "intermediate_size": 2048}, (256, 2, 2), 4, {"token_budget": 600}),  # two prompts at a time
        ({**WIDE, "intermediate_size": 64, "sliding_window": 16}, (700, 2, 2), 2, {}),  # the prompts' scores
        ({**WIDE, "num_hidden_layers": 2, "intermediate_size": 2048}, (8, 64, 4), 4, {}),  # a layer of one more token of each row
        ({**NARROW, "num_attention_heads": 16, "intermediate_size": 32, "sliding_window": 512}, (8, 8, 200), 8, {}),  # its scores
    ],
)
def test_a_rollout_holds_what_is_planned(
    new_gemma, kind: str, sizes: dict[str, Any], lengths: tuple[int, int, int], prompts: int, settings: dict[str, Any]
) -> None:
    model = new_gemma(dtype=DTYPES[kind], **sizes)
    names = ("max_prompt_length", "num_generations", "max_completion_length")
    stages = {"kv_token_budget": "memory.", "token_budget": "memory.", "top_k": "sampling.", "top_p": "sampling."}
    changed = {stages.get(name, "") + name: value for name, value in settings.items()}
    run = run_of(model, kind, **dict(zip(names, lengths, strict=True)), **changed, batch_size=prompts, gradient_accumulation_steps=1)
    whole, memory = run.whole_step, run.config.memory
    budgets = Budgets(memory.token_budget or whole.tokens, memory.kv_token_budget or whole.kv_tokens)
    held = measured(model, None, rollout(model, run, kv_tokens=budgets.kv_tokens))
    assert beside_weights(run.rollout(budgets)) == pytest.approx(held, rel=0.06)


def test_rows_that_end_early_make_room_for_others_within_what_is_planned(new_gemma) -> None:
    model = new_gemma(**NARROW_WINDOW)
    lengths = {"max_prompt_length": 40, "num_generations": 8, "max_completion_length": 64}
    run = run_of(model, "fp32", **lengths, batch_size=8, gradient_accumulation_steps=1)
    kv_tokens = 2 * (40 + 8 * 64) + 3 * 40
    for pace in (EVERY_TOKEN, IN_BURSTS):
        held = measured(model, None, rollout(model, run, kv_tokens=kv_tokens, stop_ids=OFTEN, pace=pace))
        assert held == pytest.approx(beside_weights(run.rollout(Budgets(10_000, kv_tokens))), rel=0.06)


def test_rows_move_a_layer_at_a_time(new_gemma) -> None:
    model = new_gemma(**WIDE_WINDOW)
    with LiveBytes() as live:
        cache = decode_cache(model, prompts=1, prompt_width=8, rows=16, length=32)
        cache.prefilling(torch.tensor([8]))
        cache.add_rows([0] * 16)
        for _ in range(32):
            cache.advance()
        before = live.peak = live.live
        cache.keep_rows(range(15, 7, -1))
    # eight rows of 32 tokens: the keys, or the values, of one of three layers
    assert live.peak - before == pytest.approx(8 * 32 * 4 * 128 * 4, rel=0.01)


def test_the_plan_counts_with_the_codes_own_sizes() -> None:
    assert (attention.BLOCK_SCORES, attention.TOGETHER) == (BLOCK_SCORES, TOGETHER)
    assert terms.TILE == TILE
    assert sampling.SEARCHED == BLOCK * 20
