"""Checkpoints: staged beside their final name, synced, renamed in one step, read again before an older one goes. No pickle anywhere.

A checkpoint is a folder whose MANIFEST.json names every file with its size and SHA-256, and itself with its own. Owns that folder:
written whole or not at all, and never accepted unless it is what was written. What goes into it is the trainer's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gemma_grpo.disk import DISK, Disk

MANIFEST, STATE, OPTIMIZER, ROLLOUT = "MANIFEST.json", "state.json", "optimizer.safetensors", "rollout.safetensors"
_NAME = re.compile(r"step-(\d{8,})")
_STAGED, _REPLACED, _GONE = ".tmp-", ".old-", ".trash-"
"""Before the name of what is not there yet, of what stands back until its successor is there, and of what is being deleted."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written, with the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    step: int
    """Training steps finished, or updates of the reward adapter."""
    state: Mapping[str, Any]
    optimizer: Mapping[str, Tensor]
    rollout: Mapping[str, Tensor]
    """Of the step after the finished ones, as far as it had come; empty between steps."""

    def adapter(self, role: str) -> Path:
        """A role's adapter, a PEFT folder."""
        return self.path / role


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turns what a full disk raises while `path` is written into a CheckpointError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        remedy = "Free some room and check the folder's permissions; what was written before is intact, and --resume goes on from it."
        raise CheckpointError(f"{path} was not written ({error}). {remedy}") from error


# ---- writing


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    adapters: Mapping[str, Mapping[str, bytes]],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    rollout: Mapping[str, Tensor] | None = None,
    keep: int | None = None,
    disk: Disk = DISK,
) -> Path:
    """Write `folder/step-00000012`; when this returns, it survives a power cut, and of older ones the last `keep` - 1 are left.

    `adapters` are files by name, by role; `keep` None leaves all, and at least 2 are kept: a disk can also fail later.
    Raises CheckpointError when the disk will not take it, or does not give back what it took.
    """
    content = {f"{role}/{name}": data for role, files in adapters.items() for name, data in files.items()}
    content |= {OPTIMIZER: save(dict(optimizer)), STATE: _json({"step": step, **state})}
    content |= {ROLLOUT: save(dict(rollout))} if rollout else {}
    final = folder / f"step-{step:08d}"
    try:
        _make_folder(folder, disk)
        sweep(folder, disk)
        _stage(folder / f"{_STAGED}{final.name}", {**content, MANIFEST: _manifest(step, content)}, disk)
        if os.path.lexists(final):
            disk.rename(final, folder / f"{_REPLACED}{final.name}")
        disk.rename(folder / f"{_STAGED}{final.name}", final)
        disk.sync(folder)
    except OSError as error:
        with suppress(OSError):
            sweep(folder, disk)  # it takes the room that is missing
        raise CheckpointError(_not_written(folder, step, error)) from error
    _check_readable(final, folder / f"{_REPLACED}{final.name}", disk)
    _prune(folder, _by_step(folder, up_to=step)[max(2, keep) :] if keep else [], disk)
    return final


def sweep(folder: Path, disk: Disk = DISK) -> None:
    """Put back what a killed save had only moved away, and delete what else it left. Only for the one process that writes there."""
    for path in sorted(folder.glob(".*")):
        name = path.name.removeprefix(_REPLACED)
        if path.name != name and not os.path.lexists(folder / name):
            disk.rename(path, folder / name)
        elif path.name.startswith((_STAGED, _REPLACED, _GONE)):
            if path.name != name:
                disk.sync(folder)  # its successor's name first: the process that renamed it may have ended before it could
            disk.remove(path)


def _prune(folder: Path, paths: Sequence[Path], disk: Disk) -> None:
    try:
        for path in paths:
            disk.rename(path, folder / f"{_GONE}{path.name}")  # at once: what is half deleted is no checkpoint
        sweep(folder, disk)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CheckpointError(
            f"{reason}: older checkpoints in {folder} were not deleted; the newest is written. Check the disk."
        ) from error


def _check_readable(path: Path, replaced: Path, disk: Disk) -> None:
    """Read it back; where that fails, what it replaced takes its place again."""
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        if os.path.lexists(replaced):
            disk.remove(path)
            disk.rename(replaced, path)
            disk.sync(path.parent)
        raise CheckpointError(f"{error}, just after it was written to {path.parent}: this disk loses data. Use another one.") from error


def _make_folder(folder: Path, disk: Disk) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent, disk)
        disk.make_folder(folder)
        disk.sync(folder.parent)


def _stage(folder: Path, content: Mapping[str, bytes], disk: Disk) -> None:
    """Every file and every name synced; the manifest comes last."""
    disk.make_folder(folder)
    inner = sorted({(folder / name).parent for name in content} - {folder})
    for path in inner:
        disk.make_folder(path)
    for name, data in content.items():
        disk.write(folder / name, data)
        disk.sync(folder / name)
    for path in (*inner, folder):
        disk.sync(path)


def _not_written(folder: Path, step: int, error: OSError) -> str:
    left = [path for path in _by_step(folder) if path.name != f"step-{step:08d}"] if folder.is_dir() else []
    intact = f"step {_step(left[0])} is intact, and --resume goes on from it" if left else "there is no earlier one"
    reason = (error.strerror or str(error)).lower()
    return f"{reason}: checkpoint step {step} not written in {folder}; {intact}. Free some room and check the folder's permissions."


def _json(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, allow_nan=False, indent=1).encode()


def _manifest(step: int, content: Mapping[str, bytes]) -> bytes:
    files = {name: {"size": len(data), "sha256": _sha256(data)} for name, data in sorted(content.items())}
    return _with_own_hash({"step": step, "files": files})


def _with_own_hash(data: Mapping[str, Any]) -> bytes:
    """The manifest's text; its last entry is the hash of the text without it."""
    return _json({**data, "sha256": _sha256(_json(data))})


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- reading


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is what was written, and what is wrong with each newer one; None where there is none at all.

    Raises CheckpointError when there are some and none is whole: to start over is not for a program to decide.
    """
    damaged: list[str] = []
    for path in _by_step(folder):
        try:
            return read_checkpoint(path), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        listed = "\n  ".join(damaged)
        raise CheckpointError(
            f"no usable checkpoint in {folder}; {len(damaged)} damaged:\n  {listed}\nRestore one from a copy, or start anew."
        )
    return None, damaged


def read_checkpoint(path: Path) -> Checkpoint:
    """One checkpoint, every file compared with its size and hash. Raises CheckpointError naming the file that differs."""
    listed = _read_manifest(path)
    content: dict[str, bytes] = {}
    present = _present(path)
    for name in sorted({*present, *listed} - {MANIFEST}):
        if name not in listed or name not in present:
            raise _damage(path, name, "missing" if name in listed else "not in the manifest")
        size, sha256 = listed[name]
        content[name] = _read(path, name, size)
        if _sha256(content[name]) != sha256:
            raise _damage(path, name, "sha256 mismatch")
    try:
        state, optimizer = json.loads(content[STATE]), load(content[OPTIMIZER])
        rollout = load(content[ROLLOUT]) if ROLLOUT in content else {}
    except (KeyError, ValueError, SafetensorError) as error:  # whole, but not of this program
        raise _damage(path, f"{STATE} or {OPTIMIZER}", f"cannot be read ({error!r})") from error
    return Checkpoint(path, _step(path), state, optimizer, rollout)


def _read_manifest(path: Path) -> Mapping[str, tuple[int, str]]:
    """Size and hash of every file."""
    if path.is_symlink() or not path.is_dir():
        raise _damage(path, ".", "not a folder")
    text = _read(path, MANIFEST)
    try:
        data = json.loads(text)
        step, files = int(data["step"]), {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in data["files"].items()}
        whole = _with_own_hash({"step": data["step"], "files": data["files"]}) == text
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _damage(path, MANIFEST, f"cannot be read ({error})") from error
    if not whole:
        raise _damage(path, MANIFEST, "sha256 mismatch")
    if step != _step(path):
        raise _damage(path, MANIFEST, f"it is step {step}'s")
    return files


def _read(folder: Path, name: str, size: int | None = None) -> bytes:
    """A regular file's content; a link is not followed, and a pipe not waited for."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError as error:
        raise _damage(folder, name, "missing") from error
    except OSError as error:
        raise _damage(folder, name, (error.strerror or str(error)).lower()) from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise _damage(folder, name, "not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        if size is not None and found.st_size != size:
            raise _damage(folder, name, f"size {found.st_size}, not {size}")
        try:
            return file.read()
        except OSError as error:
            raise _damage(folder, name, (error.strerror or str(error)).lower()) from error


def _present(path: Path) -> set[str]:
    try:
        return set(_entries(path))
    except OSError as error:
        raise _damage(path, ".", (error.strerror or str(error)).lower()) from error


def _entries(folder: Path, prefix: str = "") -> Iterator[str]:
    """Names of all that is not a folder, links to folders included."""
    with os.scandir(folder) as found:
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(Path(entry.path), f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name


def _by_step(folder: Path, up_to: int | None = None) -> list[Path]:
    """Checkpoints by step, newest first, damaged ones included. Never by time: a copy has other times."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted((path for path in found if up_to is None or _step(path) <= up_to), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _damage(path: Path, name: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{path.name} damaged ({name}: {reason})")
