"""Disks that fail and disks that forget: the operations of a save, and what a power cut may leave of them.

Of what was not synced nothing is promised: a file's content may be missing, half there or zeros, and of the names that changed in a
folder any may be the old ones. A rename alone is whole: the old name or the new one.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gemma_grpo.disk import Disk


class Operation(NamedTuple):
    kind: str
    path: Path
    data: bytes = b""
    to: Path | None = None


class RecordingDisk(Disk):
    """Does everything and writes it down; `drop` says which syncs are left out, as a bug would."""

    def __init__(self, drop: Callable[[Path], bool] = lambda path: False) -> None:
        self.operations: list[Operation] = []
        self.drop = drop

    def make_folder(self, path: Path) -> None:
        super().make_folder(path)
        self.operations.append(Operation("make_folder", path))

    def write(self, path: Path, data: bytes) -> None:
        super().write(path, data)
        self.operations.append(Operation("write", path, data))

    def sync(self, path: Path) -> None:
        if not self.drop(path):
            super().sync(path)
            self.operations.append(Operation("sync", path))

    def rename(self, path: Path, to: Path) -> None:
        super().rename(path, to)
        self.operations.append(Operation("rename", path, to=to))

    def remove(self, path: Path) -> None:
        super().remove(path)
        self.operations.append(Operation("remove", path))


class FailingDisk(Disk):
    """Fails at operation `at`, from 0, and at every later one if the disk `stays` full; a write that fails has written half."""

    def __init__(self, at: int, *, code: int = errno.ENOSPC, stays: bool = False) -> None:
        self.at, self.code, self.stays, self.count = at, code, stays, 0

    def _fails(self) -> bool:
        self.count += 1
        return self.count - 1 == self.at or (self.stays and self.count - 1 > self.at)

    def _error(self) -> OSError:
        return OSError(self.code, {errno.ENOSPC: "No space left on device", errno.EIO: "Input/output error"}[self.code])

    def make_folder(self, path: Path) -> None:
        if self._fails():
            raise self._error()
        super().make_folder(path)

    def write(self, path: Path, data: bytes) -> None:
        if self._fails():
            super().write(path, data[: len(data) // 2])
            raise self._error()
        super().write(path, data)

    def sync(self, path: Path) -> None:
        if self._fails():
            raise self._error()
        super().sync(path)

    def rename(self, path: Path, to: Path) -> None:
        if self._fails():
            raise self._error()
        super().rename(path, to)

    def remove(self, path: Path) -> None:
        if self._fails() and self.code != errno.ENOSPC:  # a full disk still deletes
            raise self._error()
        super().remove(path)


@dataclass
class _Entry:
    """A file or a folder: what a reader sees now, and what the disk holds for certain."""

    folder: bool
    now: bytes = b""
    certain: bytes = b""
    names: dict[str, _Entry] = field(default_factory=dict)
    certain_names: dict[str, _Entry] = field(default_factory=dict)
    pending: list[dict[str, _Entry | None]] = field(default_factory=list)
    """Changes of names since the last sync, each whole or not there."""


def replayed(root: Path, operations: Sequence[Operation]) -> _Entry:
    """The tree below `root`, an empty folder at first, after these operations."""
    tree = _Entry(folder=True)

    def entry(path: Path) -> _Entry:
        found = tree
        for name in path.relative_to(root).parts:
            found = found.names[name]
        return found

    def change(path: Path, **names: _Entry | None) -> None:
        folder = entry(path.parent)
        folder.pending.append(names)
        folder.names = _changed(folder.names, names)

    for kind, path, data, to in operations:
        if kind == "sync":
            one = entry(path)
            one.certain, one.certain_names, one.pending = one.now, dict(one.names), []
        elif kind == "rename":
            assert to is not None
            change(path, **{path.name: None, to.name: entry(path)})
        elif kind == "remove":
            change(path, **{path.name: None})
        elif kind == "make_folder":
            change(path, **{path.name: _Entry(folder=True)})
        elif path.name in entry(path.parent).names:
            entry(path).now = data
        else:
            change(path, **{path.name: _Entry(folder=False, now=data)})
    return tree


def _changed(names: dict[str, _Entry], changes: dict[str, _Entry | None]) -> dict[str, _Entry]:
    return {name: one for name, one in {**names, **changes}.items() if one is not None}


def after_a_power_cut(tree: _Entry, into: Path, generator: random.Random) -> None:
    """Write one of the states that the disk may be in to an empty folder."""
    names = tree.certain_names
    kept = generator.choice([0.0, 0.5, 1.0])
    for changes in tree.pending:
        if generator.random() < kept:
            names = _changed(names, changes)
    for name, one in names.items():
        if one.folder:
            (into / name).mkdir()
            after_a_power_cut(one, into / name, generator)
        else:
            torn = [one.certain, one.now, one.now[: len(one.now) // 2], bytes(len(one.now))]
            (into / name).write_bytes(one.now if one.now == one.certain else generator.choice(torn))
