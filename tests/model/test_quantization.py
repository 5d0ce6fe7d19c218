"""A base in 4 bits: the same roles, log-probs and adapters, on the function its rounded weights define."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.data.batch import pad_groups
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.logprobs import completion_logprobs

functional = pytest.importorskip("bitsandbytes.functional", reason="quantization=nf4 needs bitsandbytes: pip install 'gemma-grpo[nf4]'")

BATCH = pad_groups([[2, *range(150, 162)], [2, 170]], [[[210, 211, 212, 106], [220, 106]], [[106], [230, 231, 106]]])
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load(folder: Path, **options: Any) -> Gemma:
    model = Gemma.load(str(folder), lora=LoraSettings(), device=torch.device("cpu"), **options)
    torch.manual_seed(0)
    for parameter in (*model.adapter_parameters("policy").values(), *model.adapter_parameters("reward").values()):
        parameter.data.normal_(std=0.1)
    return model


def linears(model: Gemma) -> dict[str, Any]:
    """Every linear layer of the decoder, without the adapter around it."""
    named = {name: module for name, module in model.causal_lm.model.layers.named_modules() if name.endswith(LAYERS)}
    return {name: getattr(module, "base_layer", module) for name, module in named.items()}


def rounded(folder: Path, quantised: Gemma) -> Gemma:
    """The ordinary model with the weights the 4-bit one stands for."""
    plain, sources = load(folder), linears(quantised)
    for name, layer in linears(plain).items():
        weight = sources[name].weight
        layer.weight.data = functional.dequantize_4bit(weight.data, weight.quant_state)
    return plain


def measured(model: Gemma, role: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with model.role(role, train=role != "reference"):
        logprobs, entropy = completion_logprobs(model, BATCH)
        if role == "reference":
            return logprobs.detach(), torch.zeros(1)
        parameters = list(model.adapter_parameters(role).values())
        gradient = torch.autograd.grad(logprobs.sum() + entropy.sum(), parameters)
    return logprobs.detach(), torch.cat([part.flatten() for part in gradient])


def test_linear_layers_are_four_bits_and_nothing_else_is(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir, quantization="nf4")
    layers = linears(model)
    assert len(layers) == 7 * len(LAYERS)
    for name, layer in layers.items():
        # two weights to a byte
        assert layer.weight.dtype == torch.uint8, name
        assert layer.weight.numel() * 2 == layer.in_features * layer.out_features, name
    four_bits = {id(layer.weight) for layer in layers.values()}
    assert {weight.dtype for weight in model.causal_lm.parameters() if id(weight) not in four_bits} == {torch.float32}
    assert model.head_weight is model.causal_lm.get_input_embeddings().weight


@pytest.mark.parametrize("role", ["reference", "policy", "reward"])
def test_every_role_computes_what_the_rounded_weights_say(tiny_model_dir: Path, role: str) -> None:
    model = load(tiny_model_dir, quantization="nf4")
    expected, expected_gradient = measured(rounded(tiny_model_dir, model), role)
    logprobs, gradient = measured(model, role)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    unrounded, _ = measured(load(tiny_model_dir), role)
    assert 1e-3 < (unrounded - expected).abs().mean() < 1.0


def test_an_adapter_trained_in_four_bits_is_an_ordinary_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load(tiny_model_dir, quantization="nf4")
    model.save_adapter("policy", tmp_path / "adapter")
    plain = rounded(tiny_model_dir, model)
    for parameter in plain.adapter_parameters("policy").values():
        parameter.data.zero_()
    plain.load_adapter("policy", tmp_path / "adapter")
    torch.testing.assert_close(measured(plain, "policy")[0], measured(model, "policy")[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16_rescaled"])
def test_the_embedding_is_as_precision_says(tiny_model_dir: Path, precision: str) -> None:
    model = load(tiny_model_dir, quantization="nf4", precision=precision)
    model.fit_precision([[2, 150, 151]])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16_rescaled": torch.float16}[precision]
    assert model.head_weight.dtype == dtype
    logprobs, _ = measured(model, "policy")
    exact, _ = measured(load(tiny_model_dir, quantization="nf4"), "policy")
    assert (logprobs - exact).abs().mean() < 0.2


MINIATURE = {"model_name": "miniature", "dataset": "miniature", "data.max_prompts": 4, "max_prompt_length": 96}


@pytest.mark.parametrize("settings", [{}, MINIATURE], ids=["small", "miniature"])
def test_a_training_on_four_bits_runs_to_its_end(train_tiny: Callable[..., Any], settings: dict[str, Any]) -> None:
    run = train_tiny(quantization="nf4", gradient_checkpointing=True, **settings)
    assert {layer.weight.dtype for layer in linears(run.trainer.model).values()} == {torch.uint8}
    assert all(norm > 0 for norm in run.metrics("grad_norm"))
    # sampled and learned with the same rounded weights
    assert max(run.metrics("sampling_gap")) < 1e-4


def test_without_bitsandbytes_it_is_refused_with_the_command_that_mends_it(tiny_model_dir: Path) -> None:
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "import torch; from gemma_grpo.model.quantization import Quantizer\n"
        "try: Quantizer(torch.float32)\nexcept ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quantization=nf4 needs bitsandbytes, which is not installed" in done.stdout
    assert "pip install 'gemma-grpo[nf4]'" in done.stdout


EXHAUSTED = """
import resource, torch
from gemma_grpo.model.memory import is_out_of_memory
from gemma_grpo.model.quantization import Quantizer
quantizer, weight = Quantizer(torch.float32), torch.ones(8192, 8192)
held = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (held + 2**20, held + 2**20))
try: quantizer.linear(weight, torch.device("cpu"))
except Exception as error: print(type(error).__name__, is_out_of_memory(error))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits memory by Linux's means")
def test_memory_that_runs_out_while_quantising_is_not_taken_for_a_device_that_cannot() -> None:
    done = subprocess.run([sys.executable, "-c", EXHAUSTED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["RuntimeError", "True"]


def test_a_device_it_cannot_quantise_on_is_named() -> None:
    from gemma_grpo.model.quantization import Quantizer

    with pytest.raises(ValueError, match=r"cannot quantise on this mps device .*Use quantization=none"):
        Quantizer(torch.float32).linear(torch.zeros(64, 64), torch.device("mps"))
