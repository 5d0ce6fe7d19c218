"""A save that is stopped at any operation, by an error or by a power cut, loses nothing that was saved before."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from crash_disk import FailingDisk, RecordingDisk, after_a_power_cut, replayed

from gemma_grpo.checkpoint import Checkpoint, CheckpointError, latest_checkpoint, save_checkpoint, sweep
from gemma_grpo.disk import Disk
from reliability.writer_kills import run

STEPS = (1, 2, 3, 3, 4)
"""As saved one after the other: one of them twice, as a run does that went back to an older checkpoint; two are kept."""


def save(folder: Path, step: int, seed: int, disk: Disk) -> None:
    content = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes([seed]) * 100}
    optimizer, state = {"x": torch.full((50,), seed)}, {"seed": seed}
    save_checkpoint(folder, step, adapters={"policy": content}, optimizer=optimizer, state=state, keep=2, disk=disk)


def is_what_was_saved(found: Checkpoint) -> bool:
    """A checkpoint holds its seed in three places; whatever was mixed up shows."""
    seed, weights = found.state["seed"], (found.adapter("policy") / "adapter_model.safetensors").read_bytes()
    return STEPS[seed] == found.step and weights == bytes([seed]) * 100 and bool((found.optimizer["x"] == seed).all())


# ---- power cuts


def states_after_power_cuts(tmp_path: Path, disk: RecordingDisk, per_operation: int) -> tuple[int, int, int]:
    """States tried; those in which something saved was lost; and those in which something wrong was accepted."""
    run = tmp_path / "run"
    run.mkdir()
    saved_at: list[int] = []
    for seed, step in enumerate(STEPS):
        save(run / "checkpoints", step, seed, disk)
        saved_at.append(len(disk.operations))
    generator, tried, lost, wrong = random.Random(0), 0, 0, 0
    for count in range(len(disk.operations) + 1):
        tree = replayed(run, disk.operations[:count])
        promised = max((STEPS[seed] for seed, end in enumerate(saved_at) if end <= count), default=0)
        for _ in range(per_operation):
            state = tmp_path / f"state-{tried}"
            state.mkdir()
            after_a_power_cut(tree, state, generator)
            tried += 1
            sweep(state / "checkpoints")
            try:
                found, _ = latest_checkpoint(state / "checkpoints")
            except CheckpointError:
                found = None
            lost += (found.step if found else 0) < promised
            wrong += found is not None and not is_what_was_saved(found)
    return tried, lost, wrong


def test_no_power_cut_loses_what_was_saved(tmp_path: Path) -> None:
    tried, lost, wrong = states_after_power_cuts(tmp_path, RecordingDisk(), per_operation=8)
    assert tried >= 500
    assert (lost, wrong) == (0, 0)


DROPPED: dict[str, Callable[[Path], bool]] = {
    "of the adapter": lambda path: path.name == "adapter_model.safetensors",
    "of its configuration": lambda path: path.name == "adapter_config.json",
    "of the optimizer": lambda path: path.name == "optimizer.safetensors",
    "of the state": lambda path: path.name == "state.json",
    "of the manifest": lambda path: path.name == "MANIFEST.json",
    "of the names of the adapter's files": lambda path: path.name == "policy",
    "of the names of the other files": lambda path: path.name.startswith(".tmp-"),
    "of the checkpoint's own name": lambda path: path.name == "checkpoints",
    "of the name of the folder of all": lambda path: path.name == "run",
}


@pytest.mark.parametrize("drop", DROPPED.values(), ids=DROPPED.keys())
def test_every_sync_is_needed(tmp_path: Path, drop: Callable[[Path], bool]) -> None:
    _, lost, wrong = states_after_power_cuts(tmp_path, RecordingDisk(drop), per_operation=8)
    assert lost > 0
    assert wrong == 0  # the hashes see to that


# ---- errors


@contextmanager
def suppress_expected(folder: Path, reason: str) -> Iterator[None]:
    not_written = f"{reason}: checkpoint step 3 not written in {folder}; step 2 is intact, and --resume goes on from it"
    try:
        yield
    except CheckpointError as error:
        if not str(error).startswith((not_written, f"{reason}: older checkpoints in {folder} were not deleted; the newest is written")):
            raise


@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_save_that_fails_at_any_operation_leaves_what_was_there(tmp_path: Path, code: int, stays: bool) -> None:
    for at in range(1000):
        folder, disk = tmp_path / f"{at}" / "checkpoints", FailingDisk(at, code=code, stays=stays)
        folder.parent.mkdir()
        for seed, step in enumerate(STEPS[:3]):
            save(folder, step, seed, Disk())
        with suppress_expected(folder, "no space left on device" if code == errno.ENOSPC else "input/output error"):
            save(folder, STEPS[3], 3, disk)
        if disk.count <= at:
            break
        sweep(folder)
        found, _ = latest_checkpoint(folder)
        assert found is not None
        assert found.step == 3
        assert is_what_was_saved(found)
        save(folder, STEPS[4], 4, Disk())  # there is room again
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000004"]
    assert at == 19  # 2 folders, 5 files written and synced, 2 folders synced, 2 renames, a sync; and to delete: a sync, a removal


def test_the_first_save_that_fails_says_that_there_is_no_earlier_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no space left on device: checkpoint step 1 not written in .*; there is no earlier one"):
        save(tmp_path / "checkpoints", 1, 0, FailingDisk(3))
    assert latest_checkpoint(tmp_path / "checkpoints") == (None, [])


def test_a_disk_that_gives_back_something_else_is_noticed_before_an_older_one_goes(tmp_path: Path) -> None:
    class Lying(Disk):
        def write(self, path: Path, data: bytes) -> None:
            super().write(path, data.replace(b"\x03\x03", b"\x03\x02") if path.name.endswith(".safetensors") else data)

    for seed, step in enumerate(STEPS[:2]):
        save(tmp_path / "checkpoints", step, seed, Disk())
    with pytest.raises(CheckpointError, match=r"sha256 mismatch\), just after it was written to .*: this disk loses data"):
        save(tmp_path / "checkpoints", 4, 3, Lying())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002", "step-00000004"]


def test_a_killed_writer_leaves_what_it_had_saved() -> None:
    report = run(kills=60, seed=0)  # ten thousand: python -m reliability.writer_kills
    assert report["problems"] == []
    assert report["killed_in_the_middle_of_a_save"] > 10
    assert report["steps_saved"] > 20
