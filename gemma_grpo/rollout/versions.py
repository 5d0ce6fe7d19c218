"""Versions of an adapter as folders that replicas load: one for each set of weights, whole or not there, gone when nobody samples with it.

Owns the folder. A name is ROLE-NUMBER-HASH, the hash that of the weights, so that the same weights are sent once and no name ever means
two things; it covers the folder's path too, or two runs on one replica could unload each other's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from gemma_grpo.disk import DISK, Disk
from gemma_grpo.model.gemma import REFERENCE, Gemma, ModelRole

_NAME = re.compile(r"[a-zA-Z0-9-]+-(\d{1,18})-[0-9a-f]{8}")
_STAGED = ".tmp-"


@dataclass(frozen=True)
class Version:
    """A policy as replicas know it."""

    name: str
    path: Path | None
    """None for the base, which every replica has."""


class Versions:
    """Of one run's adapters, in `folder`, which is this run's alone; half-written ones there are deleted. Raises OSError."""

    def __init__(self, model: Gemma, folder: Path, disk: Disk = DISK) -> None:
        self.model, self.folder, self._disk = model, folder.resolve(), disk
        self.base = Version(model.name, None)
        self._current: dict[ModelRole, tuple[str, Version]] = {}
        self._written: list[Version] = []
        found = self._found()
        self.left_over = tuple(version for _, version in found)
        """What a process that was killed has left there."""
        self._number = 1 + max((number for number, _ in found), default=-1)  # a name that is taken is another version's

    def _found(self) -> list[tuple[int, Version]]:
        if not self.folder.is_dir():
            return []
        for path in self.folder.glob(f"{_STAGED}*"):
            self._disk.remove(path)
        named = ((path, _NAME.fullmatch(path.name)) for path in sorted(self.folder.iterdir()))
        return [(int(match[1]), Version(path.name, path)) for path, match in named if match]

    def current(self, role: ModelRole) -> Version:
        """The version of a role's present weights, written if it is a new one. Raises OSError."""
        if role == REFERENCE:
            return self.base
        files = self.model.adapter_files(role)
        digest = hashlib.sha256(str(self.folder).encode())
        for name in sorted(files):
            digest.update(hashlib.sha256(files[name]).digest())
        fingerprint = digest.hexdigest()
        known = self._current.get(role)
        if known is None or known[0] != fingerprint:
            self._current[role] = known = (fingerprint, self._write(f"{role}-{self._number}-{fingerprint[:8]}", files))
            self._number += 1
        return known[1]

    def _write(self, name: str, files: dict[str, bytes]) -> Version:
        """Under another name first: a replica must never find half of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        staged, final, disk = self.folder / f"{_STAGED}{name}", self.folder / name, self._disk
        disk.make_folder(staged)
        for file, data in files.items():
            disk.write(staged / file, data)
            disk.sync(staged / file)  # whoever reads it may be another machine
        disk.sync(staged)
        disk.rename(staged, final)
        disk.sync(self.folder)
        version = Version(name, final)
        self._written.append(version)
        return version

    def retired(self, in_use: Collection[str]) -> list[Version]:
        """Versions that are neither a role's present one nor in use, oldest first."""
        kept = {version.name for _, version in self._current.values()} | set(in_use)
        return [version for version in self._written if version.name not in kept]

    @property
    def written(self) -> tuple[Version, ...]:
        """All that are there."""
        return tuple(self._written)

    def delete(self, version: Version) -> None:
        """Remove one that no replica has any more. Raises OSError."""
        if version.path is not None and version.path.is_dir():
            self._disk.remove(version.path)
        self._written = [one for one in self._written if one != version]
