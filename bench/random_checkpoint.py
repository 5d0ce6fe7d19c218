"""A checkpoint with the exact shape of a released Gemma 3 and random weights: `python -m bench.random_checkpoint 4b FOLDER`.

Speed and memory do not depend on what the weights say, and the real ones are gated. Written as Google writes them: bfloat16
safetensors in several files, the larger sizes under the multimodal key layout (their vision tower left out: it is never read).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig, PreTrainedTokenizerFast

from gemma_grpo.shapes import ModelShape, known_shapes

MAX_FILE_BYTES = 2 * 10**9
SPREAD = 0.02
"""Standard deviation of every weight matrix; norms have gain 1."""
VOCABULARY = 262_144
SMALLEST = ModelShape("8m", 256, 6, 4, 2, 64, 1024, 8192, 128, 1)
"""For benches on a CPU: 8 M parameters, and everything a Gemma 3 has, its window and its one global layer in six included."""


def shape_of_size(size: str) -> ModelShape:
    """The shape of "8m", "270m", "1b", "4b", "12b" or "27b"."""
    return SMALLEST if size == SMALLEST.name else known_shapes()[f"google/gemma-3-{size}-it"]


def text_config(shape: ModelShape) -> Gemma3TextConfig:
    """transformers' configuration of a shape: five sliding layers to one global, and rope as the larger ones scale it."""
    multimodal = bool(shape.vision_parameters)
    scaled = {"rope_type": "linear", "factor": 8.0} if multimodal else {"rope_type": "default"}
    return Gemma3TextConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        sliding_window=shape.sliding_window,
        # 27b scales queries by hidden size / heads, all others by the head's size
        query_pre_attn_scalar=shape.hidden_size // shape.num_heads if shape.head_dim == 128 else shape.head_dim,
        max_position_embeddings=131_072 if multimodal else 32_768,
        rope_parameters={
            "full_attention": {**scaled, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    )


def write_checkpoint(size: str, folder: Path, *, seed: int = 0, text_only: bool = False) -> Path:
    """Config, tokenizer and weights of a size; a tensor at a time, so that the machine needs to hold one file of them.

    With `text_only` the larger ones are written as a text decoder too, which every program can load.
    """
    shape = shape_of_size(size)
    config = text_config(shape)
    multimodal = bool(shape.vision_parameters) and not text_only
    folder.mkdir(parents=True, exist_ok=True)
    (Gemma3Config(text_config=config.to_dict()) if multimodal else config).save_pretrained(folder)
    GenerationConfig(bos_token_id=2, eos_token_id=[1, 106], pad_token_id=0, do_sample=True).save_pretrained(folder)
    filler_tokenizer(shape.vocab_size if shape is SMALLEST else VOCABULARY).save_pretrained(folder)
    prefix = "language_model." if multimodal else ""
    weight_map: dict[str, str] = {}
    for index, file in enumerate(_files(config, seed)):
        name = f"model-{index + 1:05d}.safetensors"
        save_file({f"{prefix}{key}": weight for key, weight in file.items()}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys((f"{prefix}{key}" for key in file), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return folder


def _files(config: Gemma3TextConfig, seed: int) -> Iterator[dict[str, Tensor]]:
    """The weights, in groups of at most MAX_FILE_BYTES."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Gemma3ForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    file: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            weight = torch.zeros(shape, dtype=torch.bfloat16)
        else:
            weight = torch.empty(shape, dtype=torch.bfloat16).normal_(std=SPREAD, generator=generator)
        if file and sum(part.nbytes for part in file.values()) + weight.nbytes > MAX_FILE_BYTES:
            yield file
            file = {}
        file[name] = weight
    yield file


def filler_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Gemma's control ids, one token per byte, and made-up words up to the vocabulary: every id decodes to something."""
    controls = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<unused{i}>" for i in range(100)), "<start_of_turn>", "<end_of_turn>"]
    newline = "Ċ"
    letters = [newline, *(letter for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) if letter != newline)]
    words = [f"w{index}" for index in range(vocabulary - len(controls) - len(letters))]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate([*controls, *letters, *words])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=["8m", "270m", "1b", "4b", "12b", "27b"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(write_checkpoint(arguments.size, arguments.folder))
