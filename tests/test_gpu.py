"""What only a CUDA card can show: `pytest -m gpu`. The same code runs on a CPU in the other tests."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.data.batch import pad_groups
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.kv_cache import Extent
from gemma_grpo.model.logprobs import completion_logprobs
from gemma_grpo.model.memory import is_out_of_memory
from gemma_grpo.model.precision import base_dtype, float32_logits, float32_product, has_native_bf16
from gemma_grpo.rollout import running
from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.local import LocalEngine
from gemma_grpo.rollout.running import StepGraphs
from gemma_grpo.types import Prompt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")
BATCH = pad_groups([[2, *range(150, 162)], [2, 170]], [[[210, 211, 212, 106], [220, 106]], [[106], [230, 231, 106]]])
TOLERANCE = {"fp32": 1e-3, "fp16_rescaled": 0.02, "bf16": 0.2}


def load(folder: Path, device: torch.device, **options: Any) -> Gemma:
    model = Gemma.load(str(folder), lora=LoraSettings(), device=device, **options)
    torch.manual_seed(0)
    for parameter in model.adapter_parameters("policy").values():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape))
    model.fit_precision([[2, *range(150, 162)]])
    return model


def measured(model: Gemma) -> tuple[torch.Tensor, torch.Tensor]:
    with model.role("policy", train=True):
        logprobs, entropy = completion_logprobs(model, BATCH.to(model.device))
        gradient = torch.autograd.grad(logprobs.sum() + entropy.sum(), list(model.adapter_parameters("policy").values()))
    return logprobs.detach().cpu(), torch.cat([part.flatten().cpu() for part in gradient])


@pytest.mark.parametrize("precision", ["fp32", "fp16_rescaled", "bf16"])
def test_a_card_computes_what_the_cpu_does(tiny_model_dir: Path, precision: str) -> None:
    if precision == "bf16" and not has_native_bf16(CUDA):
        pytest.skip("this card has no bfloat16 units")
    expected, gradient = measured(load(tiny_model_dir, torch.device("cpu"), precision="fp32"))
    found, found_gradient = measured(load(tiny_model_dir, CUDA, precision=precision))
    assert (found - expected).abs().max() < TOLERANCE[precision]
    assert (found_gradient - gradient).norm() < TOLERANCE[precision] * gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_16_bit_numbers_are_summed_and_returned_in_float32(dtype: torch.dtype) -> None:
    hidden, head = (torch.randn(size, 64, device=CUDA).to(dtype) for size in (8, 512))
    logits = float32_logits(hidden, head)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ head.float().T, rtol=1e-4, atol=1e-4)
    batched = float32_product(hidden.view(2, 4, 64), head.view(2, 256, 64).transpose(1, 2))
    assert batched.dtype == torch.float32
    torch.testing.assert_close(batched, hidden.view(2, 4, 64).float() @ head.view(2, 256, 64).transpose(1, 2).float(), rtol=1e-4, atol=1e-4)


def test_precision_auto_follows_the_units_of_the_card() -> None:
    newer = torch.cuda.get_device_capability() >= (8, 0)
    assert base_dtype("auto", CUDA) == (torch.bfloat16 if newer else torch.float16)


def test_an_allocation_beyond_the_card_is_recognised() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**50, dtype=torch.uint8, device=CUDA)
    assert is_out_of_memory(refused.value)


@pytest.mark.parametrize("settings", [{}, {"precision": "fp16_rescaled"}, {"quantization": "nf4"}, {"gradient_checkpointing": True}])
def test_a_training_runs_to_its_end(train_tiny: Callable[..., Any], settings: dict[str, Any]) -> None:
    if "quantization" in settings:
        pytest.importorskip("bitsandbytes", reason="quantization=nf4 needs bitsandbytes")
    run = train_tiny(**settings)
    assert all(norm > 0 for norm in run.metrics("grad_norm"))
    assert max(run.metrics("sampling_gap")) < 0.5


def test_a_graph_makes_the_steps_that_the_same_code_makes_without_one() -> None:
    total, step = torch.zeros(4, device=CUDA), torch.ones((), device=CUDA)

    def add(extent: Extent) -> None:
        total[: extent.rows] += step
        step.mul_(2)

    graphs, wide = StepGraphs(), Extent(4, 1, 4, True, 3, 5, True)
    for extent in (*[wide] * 5, replace(wide, rows=2), *[wide] * 2):
        graphs.make(add, extent)
    # 1 + 2 + 4 + 8 + 16, then 32 for two rows alone, then 64 + 128
    assert total.tolist() == [255, 255, 223, 223]
    assert len(graphs._graphs) == 1


@pytest.mark.parametrize("kv_tokens", [None, 90])
def test_replayed_graphs_sample_what_the_cpu_samples(tiny_model_dir: Path, kv_tokens: int | None) -> None:
    prompts = [Prompt(f"prompt {length}", "test", (), (2, *range(150, 150 + length)), f"talk {length}") for length in (3, 20, 7)]
    params = SamplingParams(num_generations=4, max_completion_length=70, seed=3, temperature=0.7)
    on_cpu, on_card = (LocalEngine(load(tiny_model_dir, device, precision="fp32"), kv_tokens) for device in (torch.device("cpu"), CUDA))
    expected, found = on_cpu.sample(prompts, params), on_card.sample(prompts, params)
    for one, other in zip(expected, found, strict=True):
        for first, second in zip(one.completions, other.completions, strict=True):
            assert first.token_ids == second.token_ids
            assert first.sampling_logprobs == pytest.approx(second.sampling_logprobs, abs=1e-3)


def test_a_step_that_cannot_be_captured_is_made_without_a_graph() -> None:
    total = torch.zeros(2, device=CUDA)

    def add_and_look(extent: Extent) -> None:
        total.add_(1)
        total.sum().item()  # a capture allows no look at the device

    graphs, extent = StepGraphs(), Extent(2, 1, 2, True, 3, 5, True)
    graphs.make(add_and_look, extent)
    graphs.make(add_and_look, extent)
    with pytest.warns(UserWarning, match="goes without CUDA graphs"):
        graphs.make(add_and_look, extent)
    graphs.make(add_and_look, extent)
    assert total.tolist() == [4, 4]


def test_replayed_graphs_sample_in_bfloat16_what_single_steps_sample(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this card has no bfloat16")
    engine = LocalEngine(load(tiny_model_dir, CUDA, precision="bf16"), kv_tokens=300)
    prompts = [Prompt(f"prompt {length}", "test", (), (2, *range(150, 150 + length)), f"talk {length}") for length in (3, 20, 7)]
    params = SamplingParams(num_generations=4, max_completion_length=70, seed=3)
    replayed = engine.sample(prompts, params)
    monkeypatch.setattr(running, "EAGER_STEPS", 10**9)
    assert engine.sample(prompts, params) == replayed


def test_a_rollout_leaves_nothing_on_the_card(tiny_model_dir: Path) -> None:
    engine = LocalEngine(load(tiny_model_dir, CUDA))
    prompts, params = [Prompt("prompt", "test", (), (2, *range(150, 170)), "talk")], SamplingParams(4, 70)
    engine.sample(prompts, params)
    gc.disable()  # keys and values go when the rollout ends, not when a collection comes by
    try:
        before = torch.cuda.memory_allocated()
        engine.sample(prompts, params)
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()
