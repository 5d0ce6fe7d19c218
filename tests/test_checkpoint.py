"""A checkpoint is there whole or not at all, and no damage goes unseen."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_tensors

from gemma_grpo.checkpoint import MANIFEST, Checkpoint, CheckpointError, latest_checkpoint, read_checkpoint, save_checkpoint, sweep

STATE = {"controllers": {"beta": {"beta": 0.1 + 0.2, "smoothed": 1e-17}}, "num_tokens": 2**40, "offsets": {"metrics.jsonl": 17}, "x": None}


def moments(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.0.q_proj/exp_avg": torch.randn(3, 4, generator=generator),
        "layers.0.q_proj/exp_avg_sq": torch.tensor([0.0, -0.0, 1e-45, torch.finfo(torch.float32).max]),
        "layers.0.q_proj/step": torch.tensor(12.0),
        "half": torch.randn(5, generator=generator).bfloat16(),
    }


def policy(seed: int = 0) -> dict[str, bytes]:
    return {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": save_tensors({"lora_A": torch.full((2, 2), float(seed))})}


def save(folder: Path, step: int, seed: int = 0, **options: Any) -> Path:
    return save_checkpoint(folder, step, adapters={"policy": policy(seed)}, optimizer=moments(seed), state=STATE, **options)


def latest(folder: Path) -> Checkpoint:
    found, _ = latest_checkpoint(folder)
    assert found is not None
    return found


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


# ---- what is written


def test_what_is_read_is_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert path == tmp_path / "step-00000012"
    found = read_checkpoint(path)
    assert (found.path, found.step, found.adapter("policy")) == (path, 12, path / "policy")
    assert found.state == {"step": 12, **STATE}
    assert found.optimizer.keys() == moments(0).keys()
    for name, tensor in moments(0).items():
        assert found.optimizer[name].dtype == tensor.dtype
        assert found.optimizer[name].shape == tensor.shape
        assert bits(found.optimizer[name]) == bits(tensor)


def test_a_fresh_optimizer_has_nothing_to_save_and_that_is_fine(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 0, adapters={"policy": policy()}, optimizer={}, state={})
    assert dict(read_checkpoint(path).optimizer) == {}


def test_the_newest_is_taken_and_order_is_by_step(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nothing here") == (None, [])
    tmp_path.joinpath("empty").mkdir()
    assert latest_checkpoint(tmp_path / "empty") == (None, [])
    for step in (100, 9, 12):
        save(tmp_path, step)
    os.utime(tmp_path / "step-00000100", (0, 0))  # a copy has other times
    assert latest(tmp_path).step == 100
    save(tmp_path, 123_456_789)  # more digits than the name is padded to
    assert latest(tmp_path).path.name == "step-123456789"


def test_the_folder_holds_what_the_run_directory_promises_and_no_pickle(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert names(path) == {"policy", "optimizer.safetensors", "state.json", MANIFEST}
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".safetensors", ".json"}


def test_the_newest_are_kept_and_never_fewer_than_two(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=3)
    assert names(tmp_path) == {"step-00000004", "step-00000006", "step-00000008"}
    save(tmp_path, 10, keep=1)
    assert names(tmp_path) == {"step-00000008", "step-00000010"}
    save(tmp_path, 9, keep=2)  # a run that went back: later ones are not counted, and not taken away
    assert names(tmp_path) == {"step-00000008", "step-00000009", "step-00000010"}


def test_saving_a_step_again_replaces_it(folder: Path) -> None:
    again = read_checkpoint(save(folder, 12, seed=5))
    assert torch.equal(again.optimizer["half"], moments(5)["half"])
    assert names(folder) == {"step-00000009", "step-00000012"}


def test_a_state_that_json_cannot_hold_exactly_is_refused_and_nothing_committed(tmp_path: Path) -> None:
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Out of range float"):
            save_checkpoint(tmp_path, 3, adapters={"policy": policy()}, optimizer={}, state={"beta": wrong})
    assert latest_checkpoint(tmp_path) == (None, [])


# ---- damage


FILES = [MANIFEST, "optimizer.safetensors", "policy/adapter_config.json", "policy/adapter_model.safetensors", "state.json"]


@pytest.mark.parametrize("flips", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_flipped_bits_are_all_seen_and_named(folder: Path, flips: int) -> None:
    path, generator = folder / "step-00000012", random.Random(0)
    content = {name: (path / name).read_bytes() for name in FILES}
    for _ in range(flips):
        name = generator.choice(FILES)
        damaged = bytearray(content[name])
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        (path / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"step-00000012 damaged \({name}: (sha256 mismatch|cannot be read|it is step)"):
            read_checkpoint(path)
        (path / name).write_bytes(content[name])
    assert latest(folder).step == 12


@pytest.mark.parametrize("cuts", [200, pytest.param(2_000, marks=pytest.mark.slow)])
def test_cuts_are_all_seen_and_the_older_checkpoint_is_used(folder: Path, cuts: int) -> None:
    path, generator = folder / "step-00000012", random.Random(0)
    content = {name: (path / name).read_bytes() for name in FILES}
    for _ in range(cuts):
        name = generator.choice(FILES)
        length = generator.randrange(len(content[name]))
        (path / name).write_bytes(content[name][:length])
        found, damaged = latest_checkpoint(folder)
        assert found is not None
        assert found.step == 9
        reason = "cannot be read" if name == MANIFEST else f"size {length}, not {len(content[name])}"
        assert len(damaged) == 1
        assert damaged[0].startswith(f"step-00000012 damaged ({name}: {reason}")
        (path / name).write_bytes(content[name])


def swap(path: Path) -> None:
    other = path.parent / "step-00000009"
    shutil.copy(other / "optimizer.safetensors", path / "optimizer.safetensors")


def manifest(path: Path, **changes: Any) -> None:
    """Another manifest, its own hash made right: what no accident does."""
    import hashlib

    data = {name: value for name, value in json.loads((path / MANIFEST).read_text()).items() if name != "sha256"} | changes
    text = json.dumps(data, indent=1)
    (path / MANIFEST).write_text(json.dumps({**data, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def folder_for(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("a file is gone", lambda path: (path / "optimizer.safetensors").unlink(), r"optimizer\.safetensors: missing"),
    ("the policy is gone", lambda path: shutil.rmtree(path / "policy"), r"policy/adapter_config\.json: missing"),
    ("a file is empty", lambda path: (path / "state.json").write_text(""), r"state\.json: size 0, not \d+"),
    ("a file too many", lambda path: (path / "policy" / "extra.bin").write_bytes(b"x"), r"policy/extra\.bin: not in the manifest"),
    ("a pickle too many", lambda path: (path / "optimizer.pt").write_bytes(b"x"), r"optimizer\.pt: not in the manifest"),
    ("another step's file", swap, r"optimizer\.safetensors: sha256 mismatch"),
    ("a file is a pipe", lambda path: pipe(path / "state.json"), r"state\.json: not a regular file"),
    ("a file is a link", lambda path: link(path / "state.json"), r"state\.json: too many levels"),
    ("a file is a folder", lambda path: folder_for(path / "state.json"), r"state\.json: missing"),
    ("the policy is a link", lambda path: link(path / "policy"), r"policy: not in the manifest"),
    ("the manifest is a pipe", lambda path: pipe(path / MANIFEST), r"MANIFEST\.json: not a regular file"),
    ("no manifest", lambda path: (path / MANIFEST).unlink(), r"MANIFEST\.json: missing"),
    ("an empty manifest", lambda path: (path / MANIFEST).write_text(""), r"MANIFEST\.json: cannot be read"),
    ("a list for a manifest", lambda path: (path / MANIFEST).write_text("[]"), r"MANIFEST\.json: cannot be read"),
    ("a manifest of other types", lambda path: manifest(path, files=5), r"MANIFEST\.json: cannot be read"),
    ("files of other types", lambda path: manifest(path, files={"state.json": 5}), r"MANIFEST\.json: cannot be read"),
    ("a step beyond numbers", lambda path: (path / MANIFEST).write_text('{"step": 1e999, "files": {}}'), r"MANIFEST\.json: cannot be read"),
    ("a deep manifest", lambda path: (path / MANIFEST).write_text("[" * 100_000), r"MANIFEST\.json: cannot be read"),
    ("a manifest of nothing", lambda path: manifest(path, files={}), r"optimizer\.safetensors: not in the manifest"),
    (
        "a file outside",
        lambda path: manifest(path, files={"../step-00000009/state.json": {"size": 1, "sha256": ""}}),
        r"\.\./step-00000009/state\.json: missing",
    ),
    ("nothing in it", lambda path: [(path / name).unlink() for name in FILES], r"MANIFEST\.json: missing"),
    ("a file in its place", lambda path: (shutil.rmtree(path), path.write_text("x")), r"\.: not a folder"),
    ("a link in its place", link, r"\.: not a folder"),
]


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_every_damage_is_named_by_its_file_and_the_older_checkpoint_taken(
    folder: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(folder / "step-00000012")
    with pytest.raises(CheckpointError, match=rf"step-00000012 damaged \({message}"):
        read_checkpoint(folder / "step-00000012")
    assert latest(folder).step == 9


def test_a_checkpoint_under_another_steps_name_is_refused(folder: Path) -> None:
    (folder / "step-00000012").rename(folder / "step-00000013")
    with pytest.raises(CheckpointError, match=r"step-00000013 damaged \(MANIFEST\.json: it is step 12's\)"):
        read_checkpoint(folder / "step-00000013")


def test_when_none_is_whole_every_one_is_named_with_its_file(folder: Path) -> None:
    (folder / "step-00000009" / "state.json").write_text("{}")
    (folder / "step-00000012" / MANIFEST).unlink()
    with pytest.raises(CheckpointError) as error:
        latest_checkpoint(folder)
    message = str(error.value)
    assert f"no usable checkpoint in {folder}; 2 damaged:" in message
    assert "step-00000009 damaged (state.json: size 2, not " in message
    assert "step-00000012 damaged (MANIFEST.json: missing)" in message


def test_other_names_in_the_folder_are_not_checkpoints(folder: Path) -> None:
    (folder / "step-notes.txt").write_text("mine")
    (folder / "step-13").mkdir()
    (folder / "best").mkdir()
    assert latest(folder).step == 12


# ---- what a killed save leaves


@pytest.mark.parametrize("written", ["nothing", "part", "all"])
def test_what_a_killed_save_left_is_no_checkpoint_and_the_next_save_clears_it_away(folder: Path, written: str) -> None:
    left = folder / ".tmp-step-00000012"
    if written == "all":  # killed between the last byte and the rename
        (folder / "step-00000012").rename(left)
    else:
        shutil.rmtree(folder / "step-00000012")
        left.mkdir()
    if written == "part":
        (left / "state.json").write_text("{")
    assert latest(folder).step == 9
    assert torch.equal(read_checkpoint(save(folder, 12, seed=4)).optimizer["half"], moments(4)["half"])
    assert names(folder) == {"step-00000009", "step-00000012"}


def test_what_was_moved_aside_for_its_successor_comes_back(folder: Path) -> None:
    # killed between the two renames of a step that is saved again
    (folder / "step-00000012").rename(folder / ".old-step-00000012")
    sweep(folder)
    assert latest(folder).step == 12
    shutil.copytree(folder / "step-00000012", folder / ".old-step-00000012")  # killed before it was deleted
    (folder / ".trash-step-00000003").mkdir()
    sweep(folder)
    assert names(folder) == {"step-00000009", "step-00000012"}
