"""Which number format the frozen base is held in, on this hardware. LoRA weights, log-probs and losses are float32 always."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def default_device() -> torch.device:
    """The CUDA device of this process where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def has_native_bf16(device: torch.device) -> bool:
    """Whether matrix units take bfloat16. torch says True on a T4, which only emulates it: ask without emulation."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def base_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Dtype of the base's weights for `precision` auto, fp32 or bf16.

    Raises ValueError where bf16 is asked of a card that would emulate it.
    """
    if precision == "fp32":
        return torch.float32
    if precision == "bf16":
        if device.type == "cuda" and not has_native_bf16(device):
            name = torch.cuda.get_device_name(device)
            raise ValueError(f"precision is bf16, but {name} has no bfloat16 units and would emulate them. Use precision=auto or fp32.")
        return torch.bfloat16
    return torch.bfloat16 if has_native_bf16(device) else torch.float32


def float32_logits(hidden: Float[Tensor, "T D"], head_weight: Float[Tensor, "V D"]) -> Float[Tensor, "T V"]:
    """hidden @ head.T, accumulated and returned in float32: 16-bit logits near 70 are off by up to 0.2 nats in bfloat16."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, head_weight.T, out_dtype=torch.float32)
    return hidden.float() @ head_weight.float().T
