"""One more token of every running completion, straight from the weights: no module between them, so that a step is little but its products.

The same numbers as the model's own forward pass (tests/model/test_decode.py); adapters stay unmerged, because merging in 16 bits
swallows small updates. Owns the arithmetic of a Gemma 3 layer for single tokens, not the keys and values it reads (kv_cache.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, rms_norm

from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.kv_cache import DecodeCache, Extent
from gemma_grpo.model.precision import DividedRMSNorm


def decode_cache(model: Gemma, *, prompts: int, prompt_width: int, rows: int, length: int) -> DecodeCache:
    """Room for so many prompts of up to prompt_width tokens and rows of up to `length` own ones, in the model's dtype."""
    attentions = [layer.self_attn for layer in model.causal_lm.model.layers]
    heads = model.config.num_key_value_heads, model.config.head_dim
    sizes = {"prompts": prompts, "prompt_width": prompt_width, "rows": rows, "length": length}
    return DecodeCache([attention.sliding_window for attention in attentions], heads=heads, like=model.head_weight, **sizes)


class Decoder:
    """The weights of one role, as they are now: build it anew after an update."""

    def __init__(self, model: Gemma, max_position: int) -> None:
        decoder = model.causal_lm.model
        self.embed = decoder.embed_tokens
        self.kinds: list[str] = list(model.config.layer_types or ())
        self.model, self.layers = model, list[_Layer]()
        model.begin_pass()
        for index, layer in enumerate(decoder.layers):
            with model.layer_gathered(index):  # a layer's weights stay the same tensors, filled anew when they are gathered
                self.layers.append(_Layer(layer))
        self.norm = _Norm(decoder.norm)
        positions = torch.arange(max_position, device=model.device)[None]
        like = model.head_weight[:1]
        self.rotary = {kind: _rotary(decoder.rotary_emb(like, positions, kind)) for kind in set(self.kinds)}

    def step(self, ids: Int[Tensor, " B"], cache: DecodeCache, extent: Extent) -> Float[Tensor, "B D"]:
        """Final hidden states of the tokens now read, one for each row of the cache, which remembers their keys and values."""
        positions = cache.begin(extent)
        angles = {kind: (cos[positions], sin[positions]) for kind, (cos, sin) in self.rotary.items()}
        stream = self.embed(ids)
        self.model.begin_pass()
        for index, layer in enumerate(self.layers):
            cos, sin = angles[self.kinds[index]]
            with self.model.layer_gathered(index):
                stream = layer(stream, cos, sin, partial(cache.attend, index, layer.scaling))
        cache.end()
        return self.norm(stream)


class _Layer:
    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before_attention, self.after_attention = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self.before_mlp, self.after_mlp = _Norm(layer.pre_feedforward_layernorm), _Norm(layer.post_feedforward_layernorm)
        self.qkv = _Projections(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out, self.down = _Projections(attention.o_proj), _Projections(mlp.down_proj)
        self.gate_up = _Projections(mlp.gate_proj, mlp.up_proj)
        self.dim, self.scaling = int(attention.head_dim), float(attention.scaling)
        heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
        gains = [_gain(norm).expand(count, -1) for norm, count in zip((attention.q_norm, attention.k_norm), heads, strict=True)]
        self.num_heads, self.gains, self.eps = heads[0], torch.cat(gains), attention.q_norm.eps

    def __call__(self, stream: Tensor, cos: Tensor, sin: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        query, key, value = (states.unflatten(-1, (-1, self.dim)) for states in self.qkv(self.before_attention(stream)))
        both = torch.cat([query, key], 1)  # queries and keys are normed and rotated alike
        both = (rms_norm(both.float(), (self.dim,), None, self.eps) * self.gains).to(both.dtype)
        # roll by half a head swaps its halves: rotate_half, whose minus sign is in the sines
        both = torch.addcmul(both * cos, both.roll(self.dim // 2, -1), sin)
        attended = attend(both[:, : self.num_heads], both[:, self.num_heads :], value).flatten(1)
        stream = stream + self.after_attention(*self.out(attended))
        gate, up = self.gate_up(self.before_mlp(stream))
        return stream + self.after_mlp(*self.down(gelu(gate, approximate="tanh").mul_(up)))


class _Norm:
    """Gemma3RMSNorm: float32 inside, gain 1 + weight."""

    def __init__(self, norm: Any) -> None:
        self.gain, self.eps = _gain(norm), float(norm.eps)

    def __call__(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return rms_norm(x.float(), self.gain.shape, self.gain, self.eps).to(x.dtype)


def _gain(norm: Any) -> Float[Tensor, " D"]:
    gain: Tensor = 1.0 + norm.weight.float()
    return gain / norm.divisor if isinstance(norm, DividedRMSNorm) else gain


class _Projections:
    """Linear layers that read the same input, and what the active adapters add to them."""

    def __init__(self, *modules: Any) -> None:
        self.bases = [_base(module) for module in modules]
        self.adapters = [(index, *found) for index, module in enumerate(modules) if (found := _adapter(module)) is not None]

    def __call__(self, x: Float[Tensor, "B D"]) -> list[Tensor]:
        outputs = [base(x) for base in self.bases]
        if self.adapters:
            narrow = x.to(self.adapters[0][1].dtype)
            for index, down, up, scaling in self.adapters:
                out = outputs[index]
                outputs[index] = torch.addmm(out.to(narrow.dtype), narrow @ down.t(), up.t(), alpha=scaling).to(out.dtype)
        return outputs


def _base(module: Any) -> Callable[[Tensor], Tensor]:
    inner: Callable[[Tensor], Tensor] = getattr(module, "base_layer", module)
    if type(inner) is nn.Linear:  # not a class of its own: a quantised layer may be one
        weight, bias = inner.weight, inner.bias
        return lambda x: linear(x, weight, bias)
    return inner  # quantised: the library's own product


def _adapter(module: Any) -> tuple[Tensor, Tensor, float] | None:
    """Down, up and scale of the one active adapter."""
    if not hasattr(module, "base_layer") or module.disable_adapters:
        return None
    (name,) = (name for name in module.active_adapters if name in module.lora_A)
    return module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach(), float(module.scaling[name])


def _rotary(angles: tuple[Tensor, Tensor]) -> tuple[Float[Tensor, "T 1 D"], Float[Tensor, "T 1 D"]]:
    """Cosines and signed sines of every position."""
    cos, sin = (part[0, :, None].clone() for part in angles)
    sin[..., : sin.shape[-1] // 2].neg_()
    return cos, sin
