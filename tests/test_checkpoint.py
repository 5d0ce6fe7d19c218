"""A checkpoint is there whole or not at all, and no damage goes unseen."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gemma_grpo.checkpoint import MANIFEST, Checkpoint, CheckpointError, latest_checkpoint, read_checkpoint, save_checkpoint

STATE = {"controllers": {"beta": {"beta": 0.1 + 0.2, "smoothed": 1e-17}}, "num_tokens": 2**40, "offsets": {"metrics.jsonl": 17}, "x": None}


def moments(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.0.q_proj/exp_avg": torch.randn(3, 4, generator=generator),
        "layers.0.q_proj/exp_avg_sq": torch.tensor([0.0, -0.0, 1e-45, torch.finfo(torch.float32).max]),
        "layers.0.q_proj/step": torch.tensor(12.0),
        "half": torch.randn(5, generator=generator).bfloat16(),
    }


def write_policy(staging: Path, seed: int = 0) -> None:
    (staging / "policy").mkdir()
    (staging / "policy" / "adapter_config.json").write_text('{"r": 8}')
    save_file({"lora_A": torch.full((2, 2), float(seed))}, staging / "policy" / "adapter_model.safetensors")


def save(folder: Path, step: int, seed: int = 0) -> Path:
    return save_checkpoint(folder, step, save_policy=lambda staging: write_policy(staging, seed), optimizer=moments(seed), state=STATE)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints, the newer of which will be damaged."""
    save(tmp_path / "checkpoints", 9, seed=1)
    save(tmp_path / "checkpoints", 12, seed=2)
    return tmp_path / "checkpoints"


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist()


def test_what_is_read_is_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert path == tmp_path / "step-00000012"
    found = read_checkpoint(path)
    assert (found.path, found.step, found.policy) == (path, 12, path / "policy")
    assert found.state == {"step": 12, **STATE}
    assert found.optimizer.keys() == moments(0).keys()
    for name, tensor in moments(0).items():
        assert found.optimizer[name].dtype == tensor.dtype
        assert found.optimizer[name].shape == tensor.shape
        assert bits(found.optimizer[name]) == bits(tensor)


def test_a_fresh_optimizer_has_nothing_to_save_and_that_is_fine(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 0, save_policy=write_policy, optimizer={}, state={})
    assert dict(read_checkpoint(path).optimizer) == {}


def test_the_newest_is_taken_and_order_is_by_step(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nothing here") is None
    tmp_path.joinpath("empty").mkdir()
    assert latest_checkpoint(tmp_path / "empty") is None
    for step in (100, 9, 12):
        save(tmp_path, step)
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.step == 100


def test_the_folder_holds_what_the_run_directory_promises_and_no_pickle(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert names(path) == {"policy", "optimizer.safetensors", "state.json", MANIFEST}
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".safetensors", ".json"}


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


FILES = ["MANIFEST.json", "optimizer.safetensors", "policy/adapter_config.json", "policy/adapter_model.safetensors", "state.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_anywhere_is_seen_and_the_older_checkpoint_taken(folder: Path, name: str) -> None:
    file = folder / "step-00000012" / name
    whole, seen = file.read_bytes(), 0
    meaning = json.loads(whole) if name == MANIFEST else None
    generator = random.Random(0)
    for position in range(0, len(whole), max(1, len(whole) // 150)):
        damaged = bytearray(whole)
        damaged[position] ^= generator.choice([1 << bit for bit in range(8)])
        if meaning is not None and same_json(bytes(damaged), meaning):
            continue  # one kind of white space for another: the manifest still says what it said
        file.write_bytes(damaged)
        latest = latest_checkpoint(folder)
        assert latest is not None
        assert latest.step == 9, f"byte {position} of {name}"
        assert torch.equal(latest.optimizer["half"], moments(1)["half"])
        seen += 1
    assert seen > min(100, len(whole) // 2)
    file.write_bytes(whole)
    assert read_checkpoint(folder / "step-00000012").step == 12


def same_json(data: bytes, meaning: Any) -> bool:
    try:
        return bool(json.loads(data) == meaning)
    except ValueError:
        return False


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("a file is gone", lambda path: (path / "optimizer.safetensors").unlink(), "optimizer.safetensors is not what was written"),
    ("the policy is gone", lambda path: shutil.rmtree(path / "policy"), "policy/adapter_config.json is not what was written"),
    ("a file is cut short", lambda path: cut(path / "policy" / "adapter_model.safetensors"), "policy/adapter_model.safetensors is not"),
    ("a file is empty", lambda path: (path / "state.json").write_text(""), "state.json is not what was written"),
    ("a file too many", lambda path: (path / "policy" / "extra.bin").write_bytes(b"x"), "policy/extra.bin is not what was written"),
    ("no manifest", lambda path: (path / MANIFEST).unlink(), "MANIFEST.json cannot be read"),
    ("an empty manifest", lambda path: (path / MANIFEST).write_text(""), "MANIFEST.json cannot be read"),
    ("another manifest", lambda path: (path / MANIFEST).write_text("[]"), "MANIFEST.json cannot be read"),
    ("a manifest of other types", lambda path: (path / MANIFEST).write_text('{"step": 12, "sha256": 5}'), "MANIFEST.json cannot be read"),
    ("a step beyond numbers", lambda path: (path / MANIFEST).write_text('{"step": 1e999, "sha256": {}}'), "MANIFEST.json cannot be read"),
    ("nothing in it", lambda path: [file.unlink() for file in files_of(path)], "MANIFEST.json cannot be read"),
]


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_every_damage_is_named_by_its_file_and_the_older_checkpoint_taken(
    folder: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(folder / "step-00000012")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(folder / "step-00000012")
    latest = latest_checkpoint(folder)
    assert latest is not None
    assert latest.step == 9


def test_a_checkpoint_under_another_steps_name_is_refused(folder: Path) -> None:
    (folder / "step-00000012").rename(folder / "step-00000013")
    with pytest.raises(CheckpointError, match="step-00000013"):
        read_checkpoint(folder / "step-00000013")


def test_when_none_is_whole_every_one_is_named_with_its_file(folder: Path) -> None:
    (folder / "step-00000009" / "state.json").write_text("{}")
    (folder / "step-00000012" / MANIFEST).unlink()
    with pytest.raises(CheckpointError) as error:
        latest_checkpoint(folder)
    message = str(error.value)
    assert "no checkpoint is whole" in message
    assert "step-00000009: state.json is not what was written" in message
    assert "step-00000012: its MANIFEST.json cannot be read" in message
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("written", ["nothing", "part", "all"])
def test_what_a_killed_save_left_is_no_checkpoint_and_the_next_save_clears_it_away(folder: Path, written: str) -> None:
    left = folder / ".tmp-step-00000012"
    if written == "all":  # killed between the last byte and the rename
        (folder / "step-00000012").rename(left)
    else:
        shutil.rmtree(folder / "step-00000012")
        left.mkdir()
    if written == "part":
        write_policy(left, seed=3)
    latest = latest_checkpoint(folder)
    assert latest is not None
    assert latest.step == 9
    assert torch.equal(read_checkpoint(save(folder, 12, seed=4)).optimizer["half"], moments(4)["half"])
    assert names(folder) == {"step-00000009", "step-00000012"}


@pytest.mark.parametrize("reason", [KeyboardInterrupt, MemoryError])
def test_a_save_that_fails_leaves_the_older_checkpoint(folder: Path, reason: type[BaseException]) -> None:
    def fail(staging: Path) -> None:
        write_policy(staging, seed=3)
        raise reason

    with pytest.raises(reason):
        save_checkpoint(folder, 13, save_policy=fail, optimizer={}, state={})
    latest = latest_checkpoint(folder)
    assert latest is not None
    assert latest.step == 12


def test_saving_a_step_again_replaces_it(folder: Path) -> None:
    again = read_checkpoint(save(folder, 12, seed=5))
    assert torch.equal(again.optimizer["half"], moments(5)["half"])
    assert names(folder) == {"step-00000009", "step-00000012"}


def test_a_state_that_json_cannot_hold_exactly_is_refused_and_nothing_committed(tmp_path: Path) -> None:
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Out of range float"):
            save_checkpoint(tmp_path, 3, save_policy=write_policy, optimizer={}, state={"beta": wrong})
    assert latest_checkpoint(tmp_path) is None


def test_other_names_in_the_folder_are_not_checkpoints(folder: Path) -> None:
    (folder / "step-notes.txt").write_text("mine")
    (folder / "best").mkdir()
    latest = latest_checkpoint(folder)
    assert isinstance(latest, Checkpoint)
    assert latest.step == 12
