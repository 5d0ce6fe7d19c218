"""The text decoder of a checkpoint folder, a piece of a tensor at a time: from the file to its own dtype and device, and nothing else.

The vision tower of a multimodal checkpoint is never read; what does not fit the decoder is refused by name before any weight is.
Owns files and tensor names. Not where a folder comes from (access.py), nor which dtype (precision.py).
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

from gemma_grpo import distributed
from gemma_grpo.model.memory import release
from gemma_grpo.model.precision import FP16_MAX, trained_embed_scale
from gemma_grpo.model.quantization import Quantizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAPPED_BYTES, PIECE_BYTES = 16 * 2**20, 2**20
"""Of a file mapped at a time, and converted at a time. Small pieces: freeing large ones makes glibc keep the next weights in its heap,
whose holes cost a sixth of a 1b model (measured)."""

# Multimodal checkpoints keep the decoder under one of the first three (by the age of their transformers), text-only ones under the last.
_DECODER = re.compile(r"^(?:language_model\.model\.|model\.language_model\.|language_model\.|model\.)(?=embed_tokens\.|layers\.|norm\.)")
_HEAD = re.compile(r"^(?:language_model\.)?lm_head\.weight$")
_VISION = re.compile(r"^(?:model\.)?(?:vision_tower|multi_modal_projector)\.")
_OWN_CODE = ("auto_map", "custom_pipelines")
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """Where a decoder tensor lies on disk."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def empty_decoder(folder: Path) -> Gemma3ForCausalLM:
    """The decoder that a folder's configuration describes, on meta tensors: what cannot be built must not wait for the weights.

    Raises ValueError for anything but a plain causal Gemma 3.
    """
    # the file itself first: AutoConfig would offer to run the code that an unknown config names
    raw = _read_json(folder / "config.json")
    _refuse_own_code(folder / "config.json", raw)
    kind = raw.get("model_type")
    if kind not in ("gemma3", "gemma3_text"):
        raise ValueError(f"{folder} is a {kind} checkpoint, not a Gemma 3. Try google/gemma-3-4b-it or google/gemma-3-1b-it.")
    text = raw.get("text_config", raw)
    if not isinstance(text, dict):
        raise ValueError(f"{folder / 'config.json'}: text_config is {text!r}, not an object. Download the checkpoint again.")
    if text.get("use_bidirectional_attention"):
        raise ValueError(f"{folder} is an embedding model (bidirectional attention): it cannot write. Try google/gemma-3-270m-it.")
    if raw.get("quantization_config"):
        raise ValueError(f"{folder} is quantised already. Give the original checkpoint; quantization=nf4 quantises it while loading.")
    try:
        config: Gemma3TextConfig = AutoConfig.from_pretrained(folder).get_text_config()
        with torch.device("meta"):
            model: Gemma3ForCausalLM = Gemma3ForCausalLM(config)
    except Exception as error:  # whatever an impossible value provokes in the library
        what = " ".join(f"{type(error).__name__}: {error}".split())
        path = folder / "config.json"
        raise ValueError(f"{path} describes no Gemma 3 that can be built ({what}). Download it again.") from error
    if config.final_logit_softcapping is not None or config.attn_logit_softcapping is not None:
        raise ValueError(f"{folder} soft-caps its logits, which no released Gemma 3 does. Use an original Gemma 3 checkpoint.")
    model.tie_weights()
    return model


def check_tokenizer_files(folder: Path) -> None:
    """Raises ValueError when the tokenizer's settings name code of their own, or there is no tokenizer."""
    path = folder / "tokenizer_config.json"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(f"{folder} has no tokenizer (tokenizer.json). Copy the tokenizer files of the checkpoint it was made from.")
    if path.is_file():
        _refuse_own_code(path, _read_json(path))


def share_out(
    model: Gemma3ForCausalLM, dtype: torch.dtype, device: torch.device, *, whole_while_sampling: bool
) -> distributed.ShardedLayers:
    """Give this rank room for its part of an empty decoder's layers; `fill_decoder` fills it. Embedding and last norm stay whole."""
    layers = list(model.model.layers)
    model.requires_grad_(False)
    for layer in layers:
        layer.to(dtype)
    sharded = distributed.ShardedLayers(model.model, layers, device, whole_while_sampling=whole_while_sampling)
    for layer in layers:
        layer.to_empty(device=device)
    return sharded


def fill_decoder(
    model: Gemma3ForCausalLM, folder: Path, *, dtype: torch.dtype, device: torch.device, quantizer: Quantizer | None = None
) -> dict[str, str]:
    """Read an empty decoder's weights, every tensor accounted for: embedding and linear layers in `dtype` (or the quantizer's), norms in
    float32 when that is float16, tied head as tied. Returns each tensor's checksum (8 hex digits of the CRC-32 of its stored bytes).

    Raises ValueError naming the file or tensor that is missing, misshapen, unreadable, not finite, or beyond what float16 holds.
    """
    found = _decoder_tensors(folder, model)
    checksums: dict[str, str] = {}
    for name in sorted(found, key=lambda name: (found[name].file, name)):  # a shard after the other
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        # float16 would lose 2 % of a large post-norm gain; a few thousand numbers a layer cost nothing
        wanted = torch.float32 if dtype == torch.float16 and "norm" in owner.rpartition(".")[2] else dtype
        if quantizer is not None and isinstance(module, nn.Linear) and module is not model.lm_head:
            weight, checksums[name] = _read(found[name], dtype, torch.device("cpu"))
            parent, _, child = owner.rpartition(".")
            setattr(model.get_submodule(parent), child, quantizer.linear(weight, device))
            del weight
            release(torch.device("cpu"))  # where it was read
        else:
            shared_out = not module.get_parameter(leaf).is_meta  # only what is shared out has room already
            weight, checksums[name] = _read(found[name], wanted, torch.device("cpu") if shared_out else device)
            if not distributed.own_part(module.get_parameter(leaf), weight):
                setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
            del weight
    model.tie_weights()
    _fill_buffers(model, device, stored=found["model.embed_tokens.weight"].dtype)
    model.eval()
    return checksums


def decoder_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Decoder parameter -> where it lies in a checkpoint, a tied head as the embedding alone. Reads headers only.

    Raises ValueError as `empty_decoder` and `fill_decoder` do.
    """
    return _decoder_tensors(folder, empty_decoder(folder))


def read_whole(stored: StoredTensor) -> Tensor:
    """One tensor as it is stored. Raises ValueError when its file cannot be read."""
    with opened(stored.file) as tensors:
        weight: Tensor = tensors.get_tensor(stored.key)
    return weight


def _decoder_tensors(folder: Path, model: Gemma3ForCausalLM) -> dict[str, StoredTensor]:
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    found: dict[str, StoredTensor] = {}
    strangers: list[str] = []
    for tensor in _headers(folder):
        name = decoder_name(tensor.key)
        if name in expected:
            if name in found:
                both = " and ".join(f"{one.key} in {one.file.name}" for one in (found[name], tensor))
                raise ValueError(f"{folder} holds {name} twice, as {both}. Keep one layout.")
            found[name] = tensor
        elif name != "lm_head.weight" and not _VISION.match(tensor.key):  # a tied head may be stored: it is the embedding
            strangers.append(tensor.key)
    wrong = [
        f"{name} is {'absent' if name not in found else list(found[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name not in found or found[name].shape != shape
    ]
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} tensors are missing or misshapen: {_first(wrong)}. Download the checkpoint again.")
    if strangers:
        raise ValueError(
            f"{folder}: {len(strangers)} tensors belong to no Gemma 3 decoder: {_first(strangers)}. "
            "Give an original or merged checkpoint (not an adapter, not quantised)."
        )
    return found


def _headers(folder: Path) -> Iterator[StoredTensor]:
    """Every tensor of the checkpoint, without its numbers."""
    for file in weight_files(folder):
        with opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 - a safetensors handle, not a mapping
                part = tensors.get_slice(key)
                if part.get_dtype() not in _STORED:
                    raise ValueError(f"{file}: {key} is stored as {part.get_dtype()}; F32, F16 and BF16 are read. Save it as bfloat16.")
                yield StoredTensor(file, key, tuple(part.get_shape()), _STORED[part.get_dtype()])


def stored_bytes(folder: Path, dtype: torch.dtype | None = None) -> int:
    """Of a checkpoint's weights, a vision tower's too, as they are stored, or as they would be in `dtype`. Reads headers only."""
    return sum(math.prod(tensor.shape) * (dtype or tensor.dtype).itemsize for tensor in _headers(folder))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all of its own folder. Raises ValueError naming what is missing or leads elsewhere."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} holds no {WEIGHTS}, and pickled weights (.bin, .pt) are never read. Save it as safetensors.")
    weight_map = _read_json(folder / INDEX).get("weight_map")
    values = list(weight_map.values()) if isinstance(weight_map, dict) else []
    outside = [name for name in values if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors")]
    if outside or not values:
        raise ValueError(
            f"{folder / INDEX} names {repr(outside[0]) if outside else 'no file'}, not safetensors files of its folder. Download it again."
        )
    names = sorted(set(values))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of its {len(names)} weight files: {_first(missing)}. Download it again.")
    return [folder / name for name in names]


def decoder_name(key: str) -> str:
    """What a stored tensor is called in a plain causal Gemma 3, whichever layout its file has."""
    return "lm_head.weight" if _HEAD.match(key) else _DECODER.sub("model.", key)


def opened(file: Path) -> Any:
    """A safetensors file, mapped. Raises ValueError for one that cannot be read."""
    try:
        return safe_open(str(file), framework="pt")
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error}). Check its permissions.") from error
    except SafetensorError as error:
        with file.open("rb") as start:
            pointer = start.read(40).startswith(b"version https://git-lfs")
        what = "is a Git LFS pointer, not the weights. Run `git lfs pull`." if pointer else f"cannot be read ({error}). Download it again."
        raise ValueError(f"{file} {what}") from error


def _read(stored: StoredTensor, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, str]:
    """One tensor in its final form, filled piece by piece, and its checksum; each piece was checked finite."""
    checksum = 0
    weight = torch.empty(stored.shape, dtype=dtype, device=device)
    row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
    mapped, rows = (max(1, size // row_bytes) for size in (MAPPED_BYTES, PIECE_BYTES))
    for first in range(0, stored.shape[0], mapped):
        # opened anew: the pages of a closed map no longer count as this process's memory
        with opened(stored.file) as tensors:
            part = tensors.get_slice(stored.key)
            for start in range(first, min(first + mapped, stored.shape[0]), rows):
                piece = part[start : min(start + rows, first + mapped)]
                # CRC-32 sees every single flipped bit, at the speed of memory; an attacker it does not stop
                checksum = zlib.crc32(piece.contiguous().view(torch.uint8).numpy(), checksum)
                converted = piece.to(dtype)
                if not torch.isfinite(converted).all():
                    raise ValueError(_not_finite(stored, piece, dtype))
                weight[start : start + len(piece)] = converted
                del piece, converted
            del part
    return weight, f"{checksum:08x}"


def _not_finite(stored: StoredTensor, piece: Tensor, dtype: torch.dtype) -> str:
    if torch.isfinite(piece).all():
        return f"{stored.file}: {stored.key} reaches {piece.abs().max():.3g}, beyond {dtype} ({FP16_MAX:.0f}). Use precision=fp32 or bf16."
    bad = int((~torch.isfinite(piece)).sum())
    return f"{stored.file}: {stored.key} has {bad} numbers that are NaN or infinite. Download the checkpoint again."


def _fill_buffers(model: Gemma3ForCausalLM, device: torch.device, *, stored: torch.dtype) -> None:
    """What no checkpoint holds: rotary frequencies, and the embedding's scale as trained."""
    embedding = model.model.embed_tokens
    scale = trained_embed_scale(embedding.embedding_dim, stored)
    embedding.scalar_embed_scale = scale
    embedding.embed_scale = torch.tensor(scale, device=device)
    model.model.rotary_emb = Gemma3RotaryEmbedding(model.config, device=device)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"never filled: {left}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}: it is no checkpoint folder. Give a hub id or a checkpoint.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Download the checkpoint again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object. Download the checkpoint again.")
    return content


def _refuse_own_code(path: Path, content: Mapping[str, Any]) -> None:
    """Raise ValueError for what makes the library run code that is not its own, at any depth: the checkpoint's, or a kernel of the Hub."""
    for key, value in content.items():
        if key in _OWN_CODE and value:
            raise ValueError(f"{path} asks for code of its own ({key}), which is never run. Use a plain Gemma 3 checkpoint.")
        if ("implementation" in key or "kernel" in key) and (name := _from_elsewhere(value)) is not None:
            raise ValueError(
                f"{path} asks for code from elsewhere ({key}: {name!r}), which is never fetched or run. Use a plain Gemma 3 checkpoint."
            )
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                _refuse_own_code(path, inner)


def _from_elsewhere(value: Any) -> str | None:
    """A text in the value that is more than a word, such as "owner/kernel@revision:function"."""
    if isinstance(value, str):
        return None if re.fullmatch(r"\w*", value) else value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((name for item in inner if (name := _from_elsewhere(item)) is not None), None)


def _first(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
