"""A LoRA adapter folded into its base: the base's own folder again, with other numbers in the layers that were trained.

Every other tensor, a vision tower's too, and every key stays as it was, so that the result stands wherever the original stood. Sums are
made in float32, a tensor at a time. Owns what is written; what the result is worth is measured in export/.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, load_peft_weights
from safetensors.torch import save_file
from torch import Tensor

from gemma_grpo.access import CONFIG_FILES
from gemma_grpo.model.adapters import CONFIG, one_line
from gemma_grpo.model.adapters import WEIGHTS as ADAPTER_WEIGHTS
from gemma_grpo.model.loading import INDEX, WEIGHTS, decoder_name, opened, weight_files

FILE_BYTES = 2 * 2**30
"""Of one file at most, a larger tensor alone excepted: as much is in memory at a time."""
STORED_AS = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""What a merged model can be stored as. Not float16: Gemma 3's own activations exceed it, so that whoever loads it gets NaN."""
_NAMES = {dtype: name.removeprefix("torch.") for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))}
_PREFIX = "base_model.model."
_UNMERGED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "layer_replication")


@dataclass(frozen=True)
class Delta:
    """What one layer's adapter adds to its weight: scale * B A."""

    a: Tensor
    b: Tensor
    scale: float

    def whole(self) -> Tensor:
        """[out, in], float32."""
        return self.scale * (self.b.float() @ self.a.float())


@dataclass
class Merged:
    """What a merge did."""

    layers: int = 0
    """Weights that the adapter adds to."""
    numbers: int = 0
    """Of those weights."""
    changed: int = 0
    """Of these numbers, how many are stored otherwise than they would be without the adapter."""
    _wanted: float = 0.0
    _kept: float = 0.0
    files: list[str] = field(default_factory=list)

    @property
    def kept(self) -> float:
        """How much of the change is in what is stored: <stored change, change> / <change, change>. 1 but for rounding in float32; a
        16-bit number that the adapter moves by less than half its last digit stays what it was, and there the change is lost."""
        return self._kept / self._wanted if self._wanted else 0.0

    def count(self, weight: Tensor, delta: Tensor, stored: Tensor) -> None:
        """Add one layer: float32 weight and change, and the result as stored."""
        moved = stored.float() - weight.to(stored.dtype).float()
        self.layers += 1
        self.numbers += weight.numel()
        self.changed += int(torch.count_nonzero(moved))
        self._wanted += float((delta.double() ** 2).sum())
        self._kept += float((delta.double() * moved.double()).sum())


def read_deltas(folder: Path) -> dict[str, Delta]:
    """Decoder weight's name -> what the PEFT adapter in the folder adds to it.

    Raises ValueError for an adapter that is damaged, more than a plain LoRA, or adds nothing: one that training never moved.
    """
    try:
        config, weights = LoraConfig.from_pretrained(str(folder)), load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # whatever a damaged file provokes in the library
        raise ValueError(f"{folder} holds no PEFT adapter that can be read ({one_line(error)}). Copy the adapter again.") from error
    more = [name for name in _UNMERGED if getattr(config, name, None)]
    if more:
        raise ValueError(f"{folder / CONFIG} sets {more[0]}, which is more than a plain LoRA. Merge it with PEFT instead.")
    scale = float(config.lora_alpha) / (math.sqrt(config.r) if config.use_rslora else config.r)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, weight in weights.items():
        layer, dot, part = key.removeprefix(_PREFIX).partition(".lora_")
        if not dot or part not in ("A.weight", "B.weight") or not torch.isfinite(weight).all():
            raise ValueError(f"{folder / ADAPTER_WEIGHTS}: {key} is no finite lora_A or lora_B weight. Copy the adapter again.")
        parts.setdefault(f"{layer}.weight", {})[part[0]] = weight
    lone = [name for name, pair in parts.items() if pair.keys() != {"A", "B"}]
    if lone:
        raise ValueError(f"{folder / ADAPTER_WEIGHTS}: {lone[0]} has only one of lora_A and lora_B. Copy the adapter again.")
    deltas = {name: Delta(pair["A"], pair["B"], scale) for name, pair in parts.items()}
    if not any(bool(torch.count_nonzero(delta.whole())) for delta in deltas.values()):
        raise ValueError(f"{folder} adds nothing to its base: every product of its weights is 0. Train it, or choose a later checkpoint.")
    return deltas


def merge(
    base: Path, deltas: Mapping[str, Delta], output: Path, *, dtype: torch.dtype | None = None, file_bytes: int = FILE_BYTES
) -> Merged:
    """Write the base with these changes into the empty folder `output`, as `dtype`, or each tensor as it was stored.

    Raises ValueError when a change belongs to no weight of the base, has another shape, or leaves all that is stored as it was.
    """
    merged, missing = Merged(), dict(deltas)
    index: dict[str, str] = {}
    size = 0
    for number, tensors in enumerate(_in_files(_merged_tensors(base, missing, merged, dtype), file_bytes)):
        name = f"part-{number}"
        save_file(tensors, str(output / name), metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        size += sum(tensor.nbytes for tensor in tensors.values())
    if missing:
        raise ValueError(f"{base} has no weight {next(iter(missing))}, which the adapter adds to. Give the base it was trained on.")
    if not merged.changed:
        raise ValueError(
            f"merging changed none of {merged.numbers:,} numbers: each moves by less than half its last digit as stored. "
            "Merge with --dtype fp32, or export the adapter."
        )
    merged.files = _name_files(output, index, size)
    _copy_rest(base, output, dtype)
    return merged


def _merged_tensors(base: Path, missing: dict[str, Delta], merged: Merged, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    for file in weight_files(base):
        with opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 - a safetensors handle, not a mapping
                weight, name = tensors.get_tensor(key), decoder_name(key)
                stored_as = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
                delta = missing.pop(name, None)
                yield key, weight.to(stored_as) if delta is None else _folded(name, weight, delta.whole(), stored_as, merged)


def _folded(name: str, weight: Tensor, delta: Tensor, stored_as: torch.dtype, merged: Merged) -> Tensor:
    if weight.shape != delta.shape:
        raise ValueError(
            f"the adapter's {name} is {list(delta.shape)}, the base's {list(weight.shape)}. Give the base that the adapter was trained on."
        )
    whole = weight.float()
    stored = (whole + delta).to(stored_as)
    merged.count(whole, delta, stored)
    return stored


def _in_files(tensors: Iterator[tuple[str, Tensor]], file_bytes: int) -> Iterator[dict[str, Tensor]]:
    """As many at a time as a file holds."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if found and sum(one.nbytes for one in found.values()) + tensor.nbytes > file_bytes:
            yield found
            found = {}
        found[name] = tensor.contiguous()
    yield found


def _name_files(output: Path, index: Mapping[str, str], size: int) -> list[str]:
    """Names as every loader expects them, which say how many files there are; then the index, where there is more than one."""
    parts = sorted(set(index.values()), key=lambda part: int(part.removeprefix("part-")))
    if len(parts) == 1:
        names = {parts[0]: WEIGHTS}
    else:
        names = {part: f"model-{number:05}-of-{len(parts):05}.safetensors" for number, part in enumerate(parts, 1)}
        weight_map = {key: names[part] for key, part in index.items()}
        content = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (output / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for part, name in names.items():
        (output / part).rename(output / name)
    return list(names.values())


def _copy_rest(base: Path, output: Path, dtype: torch.dtype | None) -> None:
    """Configuration and tokenizer files as they are; the configuration says another dtype where the weights have one."""
    for pattern in CONFIG_FILES:
        for path in base.glob(pattern):
            if path.is_file() and path.name != INDEX:
                shutil.copyfile(path, output / path.name)  # the file that a link of the Hub's cache points to
    if dtype is not None:
        path = output / "config.json"
        content = _with_dtype(json.loads(path.read_text(encoding="utf-8")), _NAMES[dtype])
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _with_dtype(value: Any, name: str) -> Any:
    """With every dtype that is named, at any depth, replaced."""
    if not isinstance(value, dict):
        return value
    named = {key for key, inner in value.items() if key in ("dtype", "torch_dtype") and isinstance(inner, str)}
    return {key: name if key in named else _with_dtype(inner, name) for key, inner in value.items()}
