"""The few file operations that what must not be lost is made of.

One object, so that a test can let any of them fail, or keep of them only what a power cut would have. Owns what "written" means:
a file is there after `sync` of it, and its name after `sync` of its folder. What is written in which order is the caller's.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path


class Disk:
    """The machine's own disk. Every method raises OSError."""

    def make_folder(self, path: Path) -> None:
        """Make a folder whose parent is there."""
        path.mkdir()

    def write(self, path: Path, data: bytes) -> None:
        """Make a file with this content, in place of one that is there."""
        path.write_bytes(data)

    def sync(self, path: Path) -> None:
        """Wait until a file's content, or the names in a folder, would survive a power cut."""
        folder = path.is_dir()
        if folder and os.name == "nt":  # a folder cannot be opened there
            return
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, path: Path, to: Path) -> None:
        """Give it another name in its folder: at every moment one of both is there. A file takes the place of another."""
        path.replace(to)

    def remove(self, path: Path) -> None:
        """Delete a file, or a folder with all that is in it; a link's own entry, never what it points to."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


DISK = Disk()


def write_whole(path: Path, data: bytes, disk: Disk = DISK) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a mixture. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        disk.write(temporary, data)
        disk.sync(temporary)
        disk.rename(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    disk.sync(path.parent)


def append_all(path: Path, data: bytes) -> None:
    """Append all of `data` or, when the disk refuses, none of it. Raises OSError."""
    with path.open("ab", buffering=0) as log:
        size = log.tell()
        try:
            view = memoryview(data)
            while view:
                view = view[log.write(view) or 0 :]
        except OSError:
            log.truncate(size)
            raise
