"""Checkpoints and adapters of strangers: what would run code is refused with its reason before it is read, and nothing of it runs."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma_grpo.checkpoint import MANIFEST, CheckpointError, read_checkpoint
from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.model.gemma import Gemma


class Bomb:
    """Makes the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """What the code of a stranger makes when it runs."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()
    assert not [name for name in sys.modules if "planted" in name or name.split(".")[0] == "kernels"]


@pytest.fixture
def checkpoint(tiny_model_dir: Path, tmp_path: Path, canary: Path) -> Path:
    """A copy with a planted module and a planted pickle beside it."""
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "checkpoint"))
    (folder / "planted.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\n", encoding="utf-8")
    return folder


def plant(path: Path, canary: Path) -> Path:
    path.write_bytes(pickle.dumps(Bomb(canary)))
    return path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def load(folder: Path) -> Gemma:
    return Gemma.load(str(folder), lora=LoraSettings())


def test_the_bomb_goes_off_when_it_is_unpickled(tmp_path: Path) -> None:
    path = plant(tmp_path / "bomb.bin", tmp_path / "mark")
    pickle.loads(path.read_bytes())
    assert (tmp_path / "mark").exists()


OWN = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"auto_map": OWN}, r"asks for code of its own \(auto_map\), which is never run"),
        ({"text_config": {"model_type": "gemma3_text", "auto_map": OWN}}, r"code of its own \(auto_map\)"),
        ({"vision_config": {"deeper": [{"auto_map": OWN}]}}, r"code of its own \(auto_map\)"),
        ({"custom_pipelines": {"text": {"impl": "planted.Pipeline"}}}, r"code of its own \(custom_pipelines\)"),
        ({"_attn_implementation": "owner/kernel"}, r"code from elsewhere \(_attn_implementation: 'owner/kernel'\)"),
        ({"attn_implementation": "owner/kernel@main:attention"}, r"\(attn_implementation: 'owner/kernel@main:attention'\)"),
        ({"_attn_implementation_internal": "owner/kernel"}, r"\(_attn_implementation_internal: 'owner/kernel'\)"),
        ({"attn_implementation": {"": "eager", "text_config": "owner/kernel"}}, r"\(attn_implementation: 'owner/kernel'\)"),
        ({"text_config": {"_attn_implementation": "../planted.py"}}, r"\(_attn_implementation: '../planted.py'\)"),
        ({"_experts_implementation": "owner/kernel"}, r"\(_experts_implementation: 'owner/kernel'\)"),
        ({"kernel_config": {"RMSNorm": {"cuda": "owner/kernel:RMSNorm"}}}, r"\(kernel_config: 'owner/kernel:RMSNorm'\)"),
    ],
)
def test_a_config_that_asks_for_code_is_refused_with_the_key(checkpoint: Path, changes: dict[str, Any], reason: str) -> None:
    edit(checkpoint / "config.json", **changes)
    with pytest.raises(ValueError, match=rf"config.json asks for {reason}" if reason.startswith("code") else reason):
        load(checkpoint)


@pytest.mark.parametrize("harmless", [{"_attn_implementation": "sdpa"}, {"_attn_implementation_autoset": True}, {"auto_map": {}}])
def test_an_implementation_of_the_library_itself_is_no_code_from_elsewhere(checkpoint: Path, harmless: dict[str, Any]) -> None:
    edit(checkpoint / "config.json", **harmless)
    assert load(checkpoint).name == str(checkpoint)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "pytorch_model.bin.index.json"])
def test_weights_as_a_pickle_alone_are_refused_unread(checkpoint: Path, canary: Path, name: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    plant(checkpoint / name, canary)
    (checkpoint / "tokenizer.json").write_text("{}", encoding="utf-8")  # whatever else is wrong waits
    with pytest.raises(ValueError, match=r"pickled weights \(.bin, .pt\) are never read"):
        load(checkpoint)


def test_an_index_that_names_a_pickle_or_another_folder_is_refused(checkpoint: Path, canary: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "part.safetensors")
    for name in (plant(checkpoint / "part.bin", canary).name, "../part.safetensors", "/etc/passwd", "planted.py"):
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
        with pytest.raises(ValueError, match="not safetensors files of its folder"):
            load(checkpoint)


def test_a_pickle_named_as_safetensors_is_no_safetensors(checkpoint: Path, canary: Path) -> None:
    plant(checkpoint / "model.safetensors", canary)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load(checkpoint)


def test_pickles_beside_safetensors_are_left_alone(checkpoint: Path, canary: Path) -> None:
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth", "tokenizer.pkl"):
        plant(checkpoint / name, canary)
    load(checkpoint)


def test_json_nested_without_end_is_an_error_like_any_other(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("[" * 200_000, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        load(checkpoint)


# ---- adapters and resumed runs


def test_an_adapter_as_a_pickle_is_refused_and_one_beside_safetensors_is_left_alone(
    checkpoint: Path, tmp_path: Path, canary: Path
) -> None:
    model, folder = load(checkpoint), tmp_path / "adapter"
    model.save_adapter("reward", folder)
    plant(folder / "adapter_model.bin", canary)
    edit(folder / "adapter_config.json", auto_mapping={"base_model_class": "Model", "parent_library": "planted"})
    model.load_adapter("reward", folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors"):
        model.load_adapter("reward", folder)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "policy/adapter_model.bin", "planted.py"])
def test_a_run_whose_checkpoint_holds_a_pickle_does_not_go_on(train_tiny, tmp_path: Path, canary: Path, name: str) -> None:
    run = train_tiny(output_dir=str(tmp_path / "run"), max_steps=1, save_steps=1)
    plant(run.path / "checkpoints" / "step-00000001" / name, canary)
    with pytest.raises(CheckpointError, match=rf"step-00000001 damaged \({name}: not in the manifest\)"):
        train_tiny(output_dir=str(run.path), max_steps=2, save_steps=1, resume=True)


def test_a_manifest_of_a_stranger_can_name_a_pickle_and_still_nothing_unpickles_it(train_tiny, tmp_path: Path, canary: Path) -> None:
    import hashlib

    run = train_tiny(output_dir=str(tmp_path / "run"), max_steps=1, save_steps=1)
    folder = run.path / "checkpoints" / "step-00000001"
    data = plant(folder / "optimizer.pt", canary).read_bytes()
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["files"]["optimizer.pt"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    body = {"step": manifest["step"], "files": manifest["files"]}
    body["sha256"] = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(body, indent=1), encoding="utf-8")
    assert read_checkpoint(folder).step == 1
    train_tiny(output_dir=str(run.path), max_steps=2, save_steps=1, resume=True)
