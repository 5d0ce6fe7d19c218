"""The frozen linear layers in 4 bits: NF4 with double quantisation (QLoRA, arXiv:2305.14314), by bitsandbytes, an extra.

bitsandbytes and not code of our own: its kernels are the field's, and PEFT's LoRA layers know them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemma_grpo.model.memory import is_out_of_memory


class Quantizer:
    """Makes 4-bit linear layers that compute in `dtype`. Gradients flow through them to what lies before, never to them."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Raises ValueError when bitsandbytes is not installed or cannot be imported."""
        try:
            import bitsandbytes
        except ImportError as error:
            raise ValueError(
                f"quantization=nf4 needs bitsandbytes, which is not installed ({error}). Run `pip install 'gemma-grpo[nf4]'`."
            ) from error
        self.dtype = dtype
        self._layers: Any = bitsandbytes.nn

    def linear(self, weight: Tensor, device: torch.device) -> nn.Module:
        """[out, in] in 16 or 32 bits -> the layer holding 4 bits of each, on the device.

        Raises ValueError when the library cannot quantise there.
        """
        out_features, in_features = weight.shape
        with torch.device("meta"):
            layer: Any = self._layers.Linear4bit(
                in_features, out_features, bias=False, compute_dtype=self.dtype, quant_type="nf4", compress_statistics=True
            )
        packed = self._layers.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
        try:
            layer.weight = packed.to(device)
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"quantization=nf4: bitsandbytes cannot quantise on this {device.type} device ({error}). "
                "Use quantization=none, or a CUDA GPU."
            ) from error
        layer.weight.module = layer
        # the CPU kernel for evaluation repacks the weights in place; here training and evaluation alternate on the same ones
        layer.support_avx512bf16_for_cpu = False
        layer.quant_state = layer.weight.quant_state
        module: nn.Module = layer
        return module
