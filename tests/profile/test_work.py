"""Laws of the counted work: by hand on a tiny shape, and against torch's own counter on a real forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.profile.work import Arithmetic, Lengths, Work, attended
from gemma_grpo.shapes import ModelShape

# hidden 2, one head of 2, inner 4: q, k, v, o 4 weights each, gate, up, down 8 each = 40 a layer; 80 in both; head 5 x 2 = 10
TINY = ModelShape(
    "tiny", hidden_size=2, num_layers=2, num_heads=1, num_kv_heads=1, head_dim=2, intermediate_size=4, vocab_size=5, sliding_window=3,
    num_global_layers=1,
)  # fmt: skip
NO_ADAPTER = Arithmetic(TINY, LoraSettings(r=1, target_modules=("q_proj",)), number_bytes=4)
GROUP = [Lengths(4, (2, 0))]
NORMS = 2 * (4 * 2 + 2 * 2) + 2


def test_tokens_see_themselves_and_what_is_before_them_as_far_as_the_window_goes() -> None:
    assert attended(0, 4, None) == 1 + 2 + 3 + 4
    assert attended(0, 4, 3) == 1 + 2 + 3 + 3
    assert attended(4, 2, None) == 5 + 6
    assert attended(1, 4, 3) == 2 + 3 + 3 + 3
    assert attended(7, 2, 3) == 3 + 3
    assert attended(5, 0, 3) == 0


def test_a_prompt_is_read_once_for_its_group_and_its_completions_see_it() -> None:
    work = NO_ADAPTER.forward([Lengths(4, (2, 1))], adapter=False)
    windowed, full = (1 + 2 + 3 + 3) + (3 + 3) + 3, (1 + 2 + 3 + 4) + (5 + 6) + 5
    # 7 tokens x 80 weights x 2; for each pair a score and a weighted value: 2 x 2 numbers x 2
    assert work.operations == 7 * 80 * 2 + (windowed + full) * 8
    assert work.bytes == (80 + NORMS) * 4


def test_the_head_is_counted_on_its_rows_alone() -> None:
    without, with_head = (NO_ADAPTER.forward(GROUP, adapter=False, head_rows=rows) for rows in (0, 2))
    assert with_head.operations - without.operations == 2 * 10 * 2
    assert with_head.bytes - without.bytes == 10 * 4


def test_an_adapter_adds_its_own_weights_in_float32() -> None:
    without, adapted = (NO_ADAPTER.forward(GROUP, adapter=adapter) for adapter in (False, True))
    # rank 1 on q_proj of two layers: 2 x (2 + 2) weights
    assert adapted.operations - without.operations == 6 * 8 * 2
    assert adapted.bytes - without.bytes == 8 * 4


def test_decoding_reads_weights_once_a_step_a_prompts_keys_once_a_group_and_only_rows_that_go_on() -> None:
    prefill, *steps = NO_ADAPTER.rollout([Lengths(4, (3, 2, 1))])
    assert prefill == NO_ADAPTER.forward([Lengths(4, ())], adapter=True, head_rows=1)
    weights = (80 + NORMS + 10) * 4 + 8 * 4
    key_and_value = 2 * 2 * 4
    # position 1: rows of 3 and 2. Full layer: 4 of the prompt once, 1 of their own each; windowed (3): 2 of the prompt, 1 own each
    first = Work(2 * 2 * (80 + 8) + 2 * 2 * 10 + 2 * (5 + 3) * 8, weights + (4 + 2 + 2 + 2) * key_and_value)
    # position 2: the row of 3. Full layer: 4 and 2; windowed: 1 of the prompt, 2 own
    second = Work(2 * 1 * (80 + 8) + 2 * 1 * 10 + (6 + 3) * 8, weights + (4 + 2 + 1 + 2) * key_and_value)
    assert steps == [first, second]


@pytest.mark.parametrize("completions", [(), (0, 0), (1, 1)])
def test_what_stops_at_its_first_token_decodes_nothing(completions: tuple[int, ...]) -> None:
    assert len(NO_ADAPTER.rollout([Lengths(4, completions)])) == 1


def test_long_decoding_reads_no_more_of_windowed_layers_than_the_window() -> None:
    all_windowed = replace(NO_ADAPTER, shape=replace(TINY, num_global_layers=0))
    steps = all_windowed.rollout([Lengths(4, (10,))])[1:]
    assert {step.bytes for step in steps} == {steps[0].bytes}  # 3 keys from the first step on


def test_backward_takes_gradients_of_activations_and_of_the_adapter_alone() -> None:
    forward, backward = NO_ADAPTER.update([Lengths(3, (1,))], recomputed=False)
    windowed = full = 1 + 2 + 3
    pairs = windowed + 3 + full + 4
    # q, k and v of the first layer have an input that takes no gradient: 80 - 12. The adapter: 8 weights' own gradients, and
    # activations' through 6 of them, as the first layer's A reads that input too
    assert backward.operations == 2 * 4 * (80 - 12 + 8 + 6) + 2 * pairs * 8 + 2 * 10
    assert backward.bytes == forward.bytes
    again = NO_ADAPTER.update([Lengths(3, (1,))], recomputed=True)[1]
    assert again.operations - backward.operations == NO_ADAPTER.forward([Lengths(3, (1,))], adapter=True).operations


def test_nothing_takes_a_gradient_below_the_first_adapter() -> None:
    late = replace(NO_ADAPTER, lora=LoraSettings(r=1, target_modules=("down_proj",)))
    backward = late.update([Lengths(1, ())], recomputed=False)[1]
    # of the first layer only down_proj's adapter: its own 4 + 2 weights, and activations' through B's 2; then the whole second layer
    assert backward.operations == 2 * (40 + (6 + 2) + (6 + 6)) + 2 * 2 * 8


def test_four_bits_are_read_as_four_bits() -> None:
    half = replace(NO_ADAPTER, number_bytes=2, nf4=True).forward([], adapter=False)
    assert half.operations == 0
    assert half.bytes == pytest.approx(80 * 0.516 + NORMS * 2, abs=1)


# ---- against torch's counter: every product of a real pass, attention computed plainly over all pairs


@pytest.fixture(scope="module", params=[("q_proj", "v_proj"), ("o_proj", "up_proj"), tuple(TINY.linear_sizes)], ids=len)
def model(request: pytest.FixtureRequest, new_gemma: Callable[..., Any]) -> Any:
    return new_gemma(lora=LoraSettings(r=4, target_modules=request.param))


LENGTH = 11


def counted(model: Any, *, train: bool, operators: Collection[str]) -> tuple[int, int]:
    """Operations that torch counts in the forward and in the backward pass of one sequence, those of some operators alone."""
    parameters = list(model.adapter_parameters("policy").values())
    ids = torch.arange(120, 120 + LENGTH)[None]
    totals = []
    with model.role("policy", train=train), sdpa_kernel(SDPBackend.MATH):
        for backward in (False, True):
            with FlopCounterMode(display=False) as counter:
                hidden = model.causal_lm.model(ids, attention_mask=ALL_PAIRS, use_cache=False).last_hidden_state
                if backward:
                    torch.autograd.grad(hidden.sum(), parameters)
            found = counter.get_flop_counts()["Global"]
            totals.append(sum(count for operator, count in found.items() if str(operator).split(".")[-1] in operators))
    return totals[0], totals[1] - totals[0]


ALL_PAIRS = {kind: torch.zeros(1, 1, LENGTH, LENGTH) for kind in ("full_attention", "sliding_attention")}


def arithmetic(model: Any) -> Arithmetic:
    config, lora = model.config, model.peft.peft_config["policy"]
    shape = ModelShape(
        "tiny", config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        config.intermediate_size, config.vocab_size, config.sliding_window, config.layer_types.count("full_attention"),
    )  # fmt: skip
    return Arithmetic(shape, LoraSettings(r=lora.r, target_modules=tuple(lora.target_modules)), number_bytes=4)


def test_linear_layers_are_counted_as_torch_counts_them_forward_and_backward(model: Any) -> None:
    forward, backward = arithmetic(model).update([Lengths(LENGTH, ())], recomputed=False)
    config, (near, far) = model.config, (attended(0, LENGTH, window) for window in (model.config.sliding_window, None))
    num_global = config.layer_types.count("full_attention")
    pairs = num_global * far + (config.num_hidden_layers - num_global) * near
    attention = 4 * config.num_attention_heads * config.head_dim * pairs
    expected = forward.operations - attention, backward.operations - 2 * attention
    assert counted(model, train=True, operators={"mm", "addmm"}) == expected


def test_attention_over_all_pairs_is_counted_as_torch_counts_it(model: Any) -> None:
    forward, backward = counted(model, train=True, operators={"bmm"})
    config = model.config
    assert forward == config.num_hidden_layers * 4 * config.num_attention_heads * config.head_dim * LENGTH**2
    # the first layer's part depends on what is adapted in it: the count takes every layer whole
    assert 2 * forward * (1 - 1 / config.num_hidden_layers) <= backward <= 2 * forward


def test_the_head_and_its_gradient_are_counted_as_torch_counts_them() -> None:
    def operations(words: int) -> int:
        numbers = replace(NO_ADAPTER, shape=replace(TINY, vocab_size=words))
        return sum(work.operations for work in numbers.update([Lengths(3, (6,))], recomputed=False))

    hidden, head = torch.randn(6, TINY.hidden_size, requires_grad=True), torch.randn(30, TINY.hidden_size)
    with FlopCounterMode(display=False) as counter:
        (hidden @ head.T).log_softmax(-1)[:, 3].sum().backward()
    assert counter.get_total_flops() == operations(30) - operations(0)
