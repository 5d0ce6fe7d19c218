"""Checkpoints: staged beside their final name, hashed, renamed in one step, verified when read. safetensors and JSON only.

Owns the folder of one checkpoint. What goes into it is the trainer's; between steps no rollout buffer is alive.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "MANIFEST.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written, with the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    step: int
    """Training steps finished."""
    state: Mapping[str, Any]
    optimizer: Mapping[str, Tensor]

    @property
    def policy(self) -> Path:
        """The policy adapter, a PEFT folder."""
        return self.path / "policy"


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turns what a full disk raises while `path` is written into a CheckpointError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        remedy = "Free some room and check the folder's permissions; what was written before is intact, and --resume goes on from it."
        raise CheckpointError(f"{path} was not written ({error}). {remedy}") from error


def save_checkpoint(
    folder: Path, step: int, *, save_policy: Callable[[Path], Any], optimizer: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Path:
    """Write `folder/step-00000012`; it exists whole or not at all. `save_policy` writes the adapter into the folder it is given.

    Raises CheckpointError when the disk will not take it.
    """
    final, staging = folder / f"step-{step:08d}", folder / f".tmp-step-{step:08d}"
    with saving(final):
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir(parents=True)
            save_policy(staging)
            save_file(dict(optimizer), staging / "optimizer.safetensors")
            _write_json(staging / "state.json", {"step": step, **state})
            _write_json(staging / MANIFEST, {"step": step, "sha256": {name: _sha256(staging / name) for name in _files(staging)}})
            for path in [*staging.rglob("*"), staging]:  # folders too: a file whose name is lost is lost
                _sync(path)
        except (OSError, SafetensorError):
            shutil.rmtree(staging, ignore_errors=True)  # it takes the room that is missing
            raise
        shutil.rmtree(final, ignore_errors=True)
        os.replace(staging, final)
        _sync(folder)
    return final


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, verified; None where there is none. Raises CheckpointError when none of those present is whole."""
    damaged = []
    candidates = sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True) if folder.is_dir() else []
    for path in candidates:
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError("no checkpoint is whole:\n  " + "\n  ".join(damaged) + "\nRestore one from a copy, or start a new run.")
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """One checkpoint, every file compared with its hash. Raises CheckpointError naming the file that differs."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        hashes, step = dict(manifest["sha256"]), int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path}: its {MANIFEST} cannot be read ({error}).") from error
    found = {name: _sha256(path / name) for name in _files(path) if name != MANIFEST}
    if found != hashes or path.name != f"step-{step:08d}":
        differing = sorted(name for name in {*found, *hashes} if found.get(name) != hashes.get(name)) or [path.name]
        raise CheckpointError(f"{path}: {differing[0]} is not what was written.")
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(path, step, state, load_file(path / "optimizer.safetensors"))


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, allow_nan=False, indent=1), encoding="utf-8")


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
