"""Adapters as files: PEFT folders of safetensors and JSON, the same bytes for the same weights, and never one that does not belong.

Owns what is in such a folder. Which adapter a model uses is gemma.py's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from safetensors.torch import save
from torch import Tensor

from gemma_grpo.disk import write_whole

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapter_files(model: PeftModel, name: str) -> dict[str, bytes]:
    """What PeftModel.save_pretrained writes of one adapter, by file name, without a disk."""
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    weights = {key: value.contiguous() for key, value in state.items()}
    config = {**model.peft_config[name].to_dict(), "inference_mode": True}
    # a set in PEFT, whose order changes from process to process
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return {WEIGHTS: save(weights, metadata={"format": "pt"}), CONFIG: json.dumps(config, indent=2, sort_keys=True).encode()}


def write_adapter(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write these files as a PEFT folder; an older adapter there is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    # the new ones in place before anything goes: a stop in between must not leave a folder without an adapter
    for name, data in files.items():
        write_whole(folder / name, data)
    for stale in folder.glob("adapter_*"):
        if stale.name not in files:
            stale.unlink()


def read_adapter(path: Path, own: Mapping[str, Tensor], config: PeftConfig, name: str) -> dict[str, Tensor]:
    """The weights in a PEFT folder, for an adapter that has weights `own` and this configuration; on the CPU.

    Raises ValueError when it cannot be read, or its tensors or its scale are others.
    """
    for file in (WEIGHTS, CONFIG):
        if not (path / file).is_file():
            raise ValueError(f"{path} holds no {file}. Give the folder of a PEFT adapter.")
    weights = _read_weights(path)
    _check_same_tensors(path, weights, own, name)
    _check_same_scale(path, config)
    return weights


def one_line(error: Exception) -> str:
    """An error of a library, for a sentence of ours."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        weights = load_peft_weights(str(path), device="cpu")
    except Exception as error:  # whatever a damaged file provokes in the library: the file is what must be mended
        raise ValueError(f"{path}: its adapter_model.safetensors cannot be read ({one_line(error)}). Copy the adapter again.") from error
    broken = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(f"{path}: {broken[0]} has numbers that are NaN or infinite. Take an earlier checkpoint's adapter.")
    return weights


def _check_same_tensors(path: Path, weights: Mapping[str, Tensor], own: Mapping[str, Tensor], role: str) -> None:
    # peft writes   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight,
    # a parameter is                 model.layers.0.self_attn.q_proj.lora_A.policy.weight
    expected = {f"base_model.model.{name.replace(f'.{role}.', '.')}": tuple(weight.shape) for name, weight in own.items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if differing:
        first = differing[0]
        raise ValueError(
            f"{path} is not an adapter of this run's shape: {len(differing)} tensors differ, first {first}, which is "
            f"{found.get(first, 'absent')} there and {expected.get(first, 'absent')} here. Use the lora settings it was trained with."
        )


def _check_same_scale(path: Path, own: PeftConfig) -> None:
    # the weights alone do not say by how much they count: another alpha is a silently different model
    try:
        saved = LoraConfig.from_pretrained(str(path))
    except Exception as error:
        raise ValueError(f"{path}: its adapter_config.json cannot be read ({one_line(error)}). Copy the adapter again.") from error
    for field in ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        found, expected = getattr(saved, field), getattr(own, field)
        if found != expected:
            raise ValueError(f"{path} was trained with {field}={found}, this run has {expected}. Use the settings it was trained with.")
