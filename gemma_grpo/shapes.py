"""How large a Gemma 3 is: layers and widths by name or from a folder's config.json, and what follows from them by counting.

Owns sizes of weights, keys and values, and adapters. Not what is held at a time (planner). Loads neither torch nor transformers.
Source of the table: config.json of each checkpoint; google-deepmind/gemma gm/nn/_gemma.py and google/tunix agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gemma_grpo.config.schema import LoraSettings

MINIATURE = "miniature"
MINIATURE_DIR = Path(__file__).parent / "miniature" / "model"

NF4_BLOCK, NF4_OUTER_BLOCK = 64, 256
"""Weights that share an absmax, and absmaxes that share a float32 scale (double quantisation, arXiv:2305.14314 section 3)."""
NF4_BYTES_PER_WEIGHT = 1 / 2 + 1 / NF4_BLOCK + 4 / (NF4_BLOCK * NF4_OUTER_BLOCK)


@dataclass(frozen=True)
class ModelShape:
    """Layers and widths of a text decoder. Counts are in numbers, sizes in bytes."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    sliding_window: int
    num_global_layers: int
    """Layers that attend to everything; the others see the last `sliding_window` tokens."""
    vision_parameters: int = 0
    """Vision tower and projector of the multimodal checkpoint. Never loaded: here to say what loading it whole would take."""

    @property
    def num_sliding_layers(self) -> int:
        """Layers that see a window only."""
        return self.num_layers - self.num_global_layers

    @property
    def query_width(self) -> int:
        """Numbers in all query heads of one token."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Numbers in all key heads of one token; as many in its values."""
        return self.num_kv_heads * self.head_dim

    @property
    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer of one decoder layer."""
        hidden, query, kv, inner = self.hidden_size, self.query_width, self.kv_width, self.intermediate_size
        return {
            "q_proj": (hidden, query),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def embedding_parameters(self) -> int:
        """Input embedding, which is the output head too."""
        return self.vocab_size * self.hidden_size

    @property
    def linear_parameters(self) -> int:
        """All linear layers of all decoder layers; Gemma 3 has no biases."""
        return self.num_layers * sum(inputs * outputs for inputs, outputs in self.linear_sizes.values())

    @property
    def norm_parameters(self) -> int:
        """Gains: four over the hidden size and two over a head in each layer, and the last one."""
        return self.num_layers * (4 * self.hidden_size + 2 * self.head_dim) + self.hidden_size

    @property
    def parameters(self) -> int:
        """Of the text decoder."""
        return self.embedding_parameters + self.linear_parameters + self.norm_parameters

    def weight_bytes(self, number_bytes: int, *, nf4: bool = False, fp32_norms: bool = False) -> int:
        """The base in memory: `number_bytes` each (4 or 2), linear layers in NF4 if asked, gains in float32 if asked."""
        linear = NF4_BYTES_PER_WEIGHT if nf4 else number_bytes
        norms = self.norm_parameters * (4 if fp32_norms else number_bytes)
        return round(self.embedding_parameters * number_bytes + self.linear_parameters * linear + norms)

    def kv_bytes_per_token_per_layer(self, number_bytes: int) -> int:
        """Keys and values of one token in one layer, of either kind."""
        return 2 * self.kv_width * number_bytes

    def kv_bytes(self, tokens: int, number_bytes: int) -> tuple[int, int]:
        """Keys and values of one sequence in the sliding and in the global layers, each kept for every token."""
        each = tokens * self.kv_bytes_per_token_per_layer(number_bytes)
        return each * self.num_sliding_layers, each * self.num_global_layers

    def windowed_kv_bytes(self, tokens: int, number_bytes: int) -> int:
        """Keys and values of one sequence if sliding layers kept their window alone."""
        each = self.kv_bytes_per_token_per_layer(number_bytes)
        return each * (self.num_sliding_layers * min(tokens, self.sliding_window) + self.num_global_layers * tokens)

    def lora_parameters(self, lora: LoraSettings) -> int:
        """Of one adapter: r x (inputs + outputs) for each of its linear layers."""
        sizes = self.linear_sizes
        return self.num_layers * lora.r * sum(sum(sizes[name]) for name in set(lora.target_modules))


_VISION_TOWER = 416_866_032  # SigLIP at 896 pixels: the same in all three
_SIZES = {  # hidden, layers, heads, kv heads, head dim, intermediate, vocabulary, window, global layers, vision tower and projector
    "270m": (640, 18, 4, 1, 256, 2048, 262_144, 512, 3, 0),
    "1b": (1152, 26, 4, 1, 256, 6912, 262_144, 512, 4, 0),
    "4b": (2560, 34, 8, 4, 256, 10_240, 262_208, 1024, 5, _VISION_TOWER + 1152 * 2560 + 1152),
    "12b": (3840, 48, 16, 8, 256, 15_360, 262_208, 1024, 8, _VISION_TOWER + 1152 * 3840 + 1152),
    "27b": (5376, 62, 32, 16, 128, 21_504, 262_208, 1024, 10, _VISION_TOWER + 1152 * 5376 + 1152),
}


def known_shapes() -> dict[str, ModelShape]:
    """Hub id -> shape of every released Gemma 3, smallest first."""
    ids = [(f"google/gemma-3-{size}{suffix}", size) for size in _SIZES for suffix in ("-it", "" if size == "270m" else "-pt")]
    return {name: ModelShape(name, *_SIZES[size]) for name, size in ids}


def shape_of(model_name: str) -> ModelShape:
    """Shape of a checkpoint by hub id, by folder (its config.json), or "miniature".

    Raises ValueError for a name that is neither, with the nearest known ones, and for a config that is no Gemma 3.
    """
    folder = MINIATURE_DIR if model_name == MINIATURE else Path(model_name)
    if (folder / "config.json").is_file():
        return _read_shape(model_name, folder / "config.json")
    if folder.is_dir():
        raise ValueError(f"{model_name} holds no config.json. Give the folder of a whole checkpoint, or a hub id.")
    known = known_shapes()
    if model_name not in known:
        nearest = get_close_matches(model_name, known, n=2) or ["google/gemma-3-1b-it", "google/gemma-3-4b-it"]
        raise ValueError(
            f"{model_name} is no folder here and no released Gemma 3, so its size is not known. "
            f"Give the folder of a downloaded checkpoint, or a name such as {' or '.join(nearest)}."
        )
    return known[model_name]


# Gemma3TextConfig's own defaults: a config.json may leave out what equals them.
_DEFAULTS = {
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 9216,
    "vocab_size": 262_208,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}


def _read_shape(name: str, path: Path) -> ModelShape:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}). Download the checkpoint again.") from error
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in ("gemma3", "gemma3_text"):
        raise ValueError(f"{path} is the config of a {kind} model, not of a Gemma 3. Try google/gemma-3-4b-it or google/gemma-3-1b-it.")
    text = raw.get("text_config", {}) if kind == "gemma3" else raw
    sizes = {key: _size(path, text, key) for key in _DEFAULTS if key != "sliding_window_pattern"}
    return ModelShape(
        name=name,
        hidden_size=sizes["hidden_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        intermediate_size=sizes["intermediate_size"],
        vocab_size=sizes["vocab_size"],
        sliding_window=sizes["sliding_window"],
        num_global_layers=_num_global_layers(path, text, sizes["num_hidden_layers"]),
        vision_parameters=_vision_parameters(raw, sizes["hidden_size"]),
    )


def _size(path: Path, text: Mapping[str, Any], key: str) -> int:
    value = text.get(key, _DEFAULTS[key])
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{path}: {key} is {value!r}; it must be a whole number above 0. Download the checkpoint again.")
    return value


def _num_global_layers(path: Path, text: Mapping[str, Any], layers: int) -> int:
    kinds: Sequence[Any] | None = text.get("layer_types")
    if kinds is not None:
        return sum(kind == "full_attention" for kind in kinds)
    # configs from before layer_types say: every so many layers one is global
    pattern_key = "_sliding_window_pattern" if "_sliding_window_pattern" in text else "sliding_window_pattern"
    return layers // _size(path, {"sliding_window_pattern": text.get(pattern_key, 6)}, "sliding_window_pattern")


def _vision_parameters(raw: Mapping[str, Any], hidden: int) -> int:
    """The released multimodal checkpoints share one tower; the projector maps its 1152 numbers to the hidden size."""
    return _VISION_TOWER + 1152 * hidden + 1152 if raw["model_type"] == "gemma3" else 0
