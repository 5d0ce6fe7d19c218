"""Which number format the frozen base is held in, on this hardware. LoRA weights, log-probs and losses are float32 always.

Gemma 3's residual stream grows to some 800,000, beyond float16's 65,504, because its post-norms learned large gains. Every reader of
that stream is an RMSNorm, which does not see its scale: dividing everything written to it by a power of two (embedding scale, post-norm
gains) and eps by its square changes no output, to the bit in float32, and brings float16 into range. Idea: huggingface/transformers
PR 37226, made exact. LoRA sits between the norms, so its adapters fit the original and the rescaled base alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from gemma_grpo.cards import BF16_CAPABILITY, number_format
from gemma_grpo.shapes import known_shapes

FP16_MAX = 65504.0
HEADROOM = 4.0
"""The probe's largest number stays this many times below FP16_MAX: other prompts, and adapters, reach further."""
FIRST_DIVISOR, LAST_DIVISOR = 64, 16384
"""64 brings 800,000 to 12,500; any of 16 to 1024 rounds alike (measured), so the first one is kept unless it is too small."""
MAX_GATED = 2.0**14
"""Largest product of gate and up projection trusted in float16: down_proj sums 2,048 to 21,504 of them."""
LIFT = 16.0
"""What the largest per-token weight is lifted to: gradients stay finite up to some 2^14 and are rounded away below 2^2 (measured on
the large-normed model of tests/model/test_fp16.py)."""
REDUCTION, MAX_REDUCTIONS = 4.0, 5
"""A gradient that still overflows a thousand times lower is not float16's fault."""


def default_device() -> torch.device:
    """The CUDA device of this process where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def has_native_bf16(device: torch.device) -> bool:
    """Whether matrix units take bfloat16. torch says True on a T4, which only emulates it: ask without emulation."""
    return device.type == "cuda" and (torch.version.hip is not None or torch.cuda.get_device_capability(device) >= BF16_CAPABILITY)


def base_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Dtype of the base's weights and activations; float16 always means rescaled.

    Raises ValueError where bf16 is asked of a card that would emulate it, and for plain fp16.
    """
    on_cuda = device.type == "cuda"
    card = torch.cuda.get_device_name(device) if on_cuda else "CPU"
    kind = number_format(precision, on_cuda=on_cuda, native_bf16=has_native_bf16(device), card=card)
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16_rescaled": torch.float16}[kind]


def trained_embed_scale(hidden_size: int, stored: torch.dtype) -> float:
    """sqrt(hidden_size) as training rounded it: to bfloat16 for Google's checkpoints (50.5, not 50.596, for 4b) at whatever dtype they
    are loaded, exact for others kept in float32."""
    exact = math.sqrt(hidden_size)
    released = any(shape.hidden_size == hidden_size for shape in known_shapes().values())
    return float(torch.tensor(exact, dtype=torch.bfloat16)) if released or stored != torch.float32 else exact


# ---- the exact rescale


class DividedRMSNorm(Gemma3RMSNorm):
    """A post-norm whose output is divided by a power of two: in float32, where that only moves the exponent."""

    divisor: float = 1.0

    def forward(self, x: Float[Tensor, "*t D"]) -> Float[Tensor, "*t D"]:
        """RMSNorm of x with gain (1 + weight) / divisor, in x's dtype."""
        normed: Tensor = self._norm(x.float()) * (1.0 + self.weight.float())  # type: ignore[no-untyped-call]
        return (normed / self.divisor).type_as(x)


def rescale_residual(model: Gemma3ForCausalLM, divisor: int) -> None:
    """Make the residual stream `divisor` times smaller and everything read from it the same. Absolute, so it can be called again.

    Raises ValueError unless the divisor is a power of two: any other would round.
    """
    if divisor < 1 or divisor & (divisor - 1):
        raise ValueError(f"the divisor is {divisor}; only a power of two is exact. Use 64.")
    decoder, eps = model.model, model.config.rms_norm_eps / divisor**2
    embedding = decoder.embed_tokens
    embedding.embed_scale.fill_(embedding.scalar_embed_scale / divisor)
    for layer in decoder.layers:
        for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
            norm = getattr(layer, name)
            if not isinstance(norm, DividedRMSNorm):
                divided = DividedRMSNorm(len(norm.weight), norm.eps)
                divided.weight = norm.weight
                setattr(layer, name, divided)
            getattr(layer, name).divisor = float(divisor)
        layer.input_layernorm.eps = layer.pre_feedforward_layernorm.eps = eps
    decoder.norm.eps = eps


@dataclass
class Peaks:
    """Largest magnitudes seen in one or more passes, by what they are; infinite where float16 overflowed."""

    seen: list[tuple[str, Tensor]] = field(default_factory=list)

    def note(self, kind: str, values: Tensor) -> None:
        """Remember max |values|, without waiting for the device."""
        self.seen.append((kind, values.detach().abs().amax().float()))

    def in_order(self) -> list[tuple[str, float]]:
        """Everything seen, as it came; a NaN counts as infinite."""
        peaks = torch.stack([peak for _, peak in self.seen]).nan_to_num(nan=math.inf, posinf=math.inf).tolist()
        return list(zip((kind for kind, _ in self.seen), peaks, strict=True))

    def largest(self, kind: str) -> float:
        """The largest of a kind."""
        return max(peak for seen, peak in self.in_order() if seen == kind)


@contextmanager
def watching_peaks(model: Gemma3ForCausalLM) -> Iterator[Peaks]:
    """Record the residual stream, gate*up, and what the attention projections give, in every forward pass inside."""
    peaks, hooks = Peaks(), []

    def output(module: nn.Module, kind: str) -> None:
        hooks.append(module.register_forward_hook(lambda _m, _i, out: peaks.note(kind, out)))

    def reads(module: nn.Module, kind: str) -> None:
        hooks.append(module.register_forward_pre_hook(lambda _m, inputs: peaks.note(kind, inputs[0])))

    output(model.model.embed_tokens, "residual")
    output(model.model.norm, "hidden")
    for layer in model.model.layers:
        reads(layer.pre_feedforward_layernorm, "residual")
        output(layer, "residual")
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            output(getattr(layer.self_attn, name), "attention")
        reads(layer.mlp.down_proj, "gated")
    try:
        yield peaks
    finally:
        for hook in hooks:
            hook.remove()


def choose_divisor(model: Gemma3ForCausalLM, forward: Callable[[], object]) -> dict[str, float]:
    """Rescale the model by a power of two, 64 or more, that leaves HEADROOM over the passes `forward` makes; what was found.

    Keys: divisor, and the largest magnitudes of residual (in the original's units), attention, gated and hidden. Raises
    FloatingPointError, naming what is too large, when float16 cannot hold this model at any divisor.
    """
    divisor = FIRST_DIVISOR
    while True:
        rescale_residual(model, divisor)
        with watching_peaks(model) as peaks, torch.no_grad():
            forward()
        found = {kind: peaks.largest(kind) for kind in ("residual", "attention", "gated", "hidden")}
        residual = found["residual"]
        if residual <= FP16_MAX / HEADROOM:
            break
        if math.isinf(residual) and (guilty := _first_overflow(peaks)) != "residual":
            raise FloatingPointError(_too_large(_NAMES[guilty], math.inf, "no divisor changes that"))
        # infinite: the size is unknown, so a long step; else the smallest power of two that does
        divisor *= 16 if math.isinf(residual) else 2 ** math.ceil(math.log2(residual * HEADROOM / FP16_MAX))
        if divisor > LAST_DIVISOR:
            raise FloatingPointError(_too_large("residual stream", residual, f"even divided by {LAST_DIVISOR}"))
    for kind, limit in (("attention", FP16_MAX / HEADROOM), ("gated", MAX_GATED), ("hidden", FP16_MAX / HEADROOM)):
        if found[kind] > limit:
            raise FloatingPointError(_too_large(_NAMES[kind], found[kind], f"the limit is {limit:.0f}"))
    return {"divisor": float(divisor), **found, "residual": residual * divisor}


_NAMES = {"attention": "largest attention projection", "gated": "product gate*up", "hidden": "final norm's output"}


def _first_overflow(peaks: Peaks) -> str:
    """What overflowed first in the order of the pass: everything behind it is infinite too."""
    return next(kind for kind, peak in peaks.in_order() if not math.isfinite(peak))


def _too_large(what: str, value: float, limit: str) -> str:
    return (
        f"fp16_rescaled: on the first prompts the {what} reaches {value:.3g} ({limit}), too near to float16's {FP16_MAX:.0f}. "
        "Use precision=fp32, or a GPU with bfloat16 units (compute capability 8.0 or newer)."
    )


# ---- what 16 bits must not round


def float32_logits(hidden: Float[Tensor, "T D"], head_weight: Float[Tensor, "V D"]) -> Float[Tensor, "T V"]:
    """hidden @ head.T, accumulated and returned in float32: 16-bit logits near 70 are off by up to 0.2 nats in bfloat16."""
    if hidden.is_cuda:
        return float32_product(hidden, head_weight.T)
    # of a few rows: CPU libraries are 1.5 times faster at a tall matrix times a few columns than at its transpose (measured)
    return float32_product(head_weight, hidden.T).T.contiguous()


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of matrices or of equal batches of them, accumulated and returned in float32."""
    if left.dtype == torch.float32 or not left.is_cuda:
        return left.float() @ right.float()
    if left.dim() == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    product: Tensor = torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out_dtype=torch.float32)
    batched: Tensor = product.unflatten(0, left.shape[:-2])
    return batched


class LossScale:
    """Lifts losses into float16's range for their backward pass; does nothing at other dtypes.

    A mean loss divides by thousands of tokens: its gradients, in float16 between the layers, would drown below 6e-8. A power of two
    brings the largest per-token weight to about LIFT. When a gradient overflows it is made again, lifted REDUCTION times less, and so are
    the next ones; each call of `relax` takes one reduction back.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.active = dtype == torch.float16
        self.reductions = 0
        self.retries = 0
        """Gradients that overflowed so far, each made again."""

    def of(self, largest_weight: float) -> float:
        """The factor for a loss whose largest weight of a token (or pair) is given."""
        if not self.active or largest_weight <= 0:
            return 1.0
        return LIFT * 2.0 ** -math.floor(math.log2(largest_weight)) / REDUCTION**self.reductions

    def relax(self) -> None:
        """Lift the next step's gradients once more after an overflow: it may have been one batch's."""
        self.reductions = max(0, self.reductions - 1)

    def gradient(self, loss: Tensor, parameters: Sequence[Tensor], largest_weight: float) -> list[Tensor | None] | None:
        """d loss / d parameters, float32, with None where there is none; None for all when it overflowed and the loss must be made
        again, to be lifted less. A loss that is not finite is no overflow: what it gives is given."""
        scale = self.of(largest_weight)
        found = torch.autograd.grad(loss * scale, list(parameters), allow_unused=True)
        gradient: list[Tensor | None] = [None if part is None else part / scale for part in found]
        if self.active and self.reductions < MAX_REDUCTIONS and torch.isfinite(loss) and not _all_finite(gradient):
            self.reductions, self.retries = self.reductions + 1, self.retries + 1
            return None
        return gradient

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"reductions": float(self.reductions), "retries": float(self.retries)}

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from what state() gave."""
        self.reductions, self.retries = int(state["reductions"]), int(state["retries"])


def _all_finite(parts: Sequence[Tensor | None]) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in parts if part is not None)
