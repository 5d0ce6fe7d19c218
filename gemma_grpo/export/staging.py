"""Where an export goes: nothing of the user's is replaced unasked, there is room for it, and a folder that has its name is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_grpo.disk import DISK

RECORD = "export.json"
"""In the exported folder: what it was made of, and what was found when it was read again. It tells our folders from others'."""


class ExportError(RuntimeError):
    """What was written is not the trained model, and was deleted again. The message says what was found."""


def check_free(target: Path, *, overwrite: bool) -> None:
    """Raise ValueError where something is in the way that may not be replaced."""
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise ValueError(f"{target} is in the way and no folder. Name another one: --output FOLDER.")
    ours = (target / RECORD).is_file()
    if any(target.iterdir()) and not (overwrite and ours):
        how = "replace it with --overwrite, or name another" if ours else "it is no export, so it is never replaced: name another"
        raise ValueError(f"{target} is there already. To export again, {how}: --output FOLDER.")


def check_room(target: Path, wanted: int) -> None:
    """Raise ValueError where the disk has less than `wanted` bytes left."""
    there = next(path for path in (target, *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < wanted:
        has, needs = (f"{size / 2**30:.1f} GiB" for size in (free, wanted))
        raise ValueError(f"{there} has {has} left and the export needs {needs}. Use --output on another disk.")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the target's place when the block ends well, and is deleted when it does not. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    if folder.exists():
        DISK.remove(folder)
    DISK.make_folder(folder)
    try:
        yield folder
        for path in (*sorted(folder.rglob("*")), folder):
            DISK.sync(path)
        _put(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _put(folder: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        DISK.rename(target, old)
    DISK.rename(folder, target)
    DISK.sync(target.parent)
    if old.exists():
        DISK.remove(old)
