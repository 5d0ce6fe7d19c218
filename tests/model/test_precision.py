"""Number formats: the base in the asked one, everything that is learned or measured in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.data.batch import pad_groups
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.logprobs import completion_logprobs
from gemma_grpo.model.precision import base_dtype, default_device, float32_logits, has_native_bf16

CPU = torch.device("cpu")
BATCH = pad_groups([[2, *range(150, 162)], [2, 170]], [[[210, 211, 212, 106], [220, 106]], [[106], [230, 231, 106]]])


@pytest.mark.parametrize(("precision", "dtype"), [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_on_a_cpu_auto_is_float32_and_what_is_asked_for_is_given(tiny_model_dir: Path, precision: str, dtype: torch.dtype) -> None:
    assert base_dtype(precision, CPU) == dtype
    model = Gemma.load(str(tiny_model_dir), lora=LoraSettings(), precision=precision, device=CPU)
    adapters = {**model.adapter_parameters("policy"), **model.adapter_parameters("reward")}
    for name, parameter in model.causal_lm.named_parameters():
        assert parameter.dtype == (torch.float32 if name in adapters else dtype), name


def test_a_cpu_has_no_native_bfloat16_and_is_the_default_without_a_card() -> None:
    assert not has_native_bf16(CPU)
    assert default_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def measured(model: Gemma, role: Any) -> torch.Tensor:
    with model.role(role, train=True):
        logprobs, entropy = completion_logprobs(model, BATCH)
        (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.dtype == entropy.dtype == torch.float32
    return logprobs.detach()


def test_bfloat16_trains_in_float32_and_stays_near_it(tiny_model_dir: Path) -> None:
    exact, rounded = (Gemma.load(str(tiny_model_dir), lora=LoraSettings(), precision=p, device=CPU) for p in ("fp32", "bf16"))
    for role in ("policy", "reward"):
        assert (measured(rounded, role) - measured(exact, role)).abs().max() < 0.2
        for parameter in rounded.adapter_parameters(role).values():  # type: ignore[arg-type]
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32


def test_logits_are_float32_sums_of_exact_products() -> None:
    # 1 + 2^-9 needs ten bits, bfloat16 has eight: a product rounded to bfloat16 would be 1
    hidden, head = torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16), torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    logits = float32_logits(hidden, head)
    assert logits.dtype == torch.float32
    assert logits.item() == 1 + 2.0**-9
