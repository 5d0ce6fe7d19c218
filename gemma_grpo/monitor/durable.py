"""Writes that are whole or not at all, places where they could not be, strict JSON, and disk errors in words.

Not which files a run has (events.py).
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gemma_grpo.disk import append_all, write_whole


class RunDirectoryError(ValueError):
    """The run directory cannot be used or written; the message says what, where and how to mend it."""


_REMEDIES = {
    errno.ENOSPC: "the disk is full. Free some room; what was written before is intact",
    errno.EDQUOT: "the disk quota is used up. Free some room; what was written before is intact",
    errno.EFBIG: "the file would exceed the size limit. Raise the limit (ulimit -f); what was written before is intact",
    errno.EACCES: "this user may not write there. Change the permissions, or choose another output_dir",
    errno.EPERM: "this user may not write there. Change the permissions, or choose another output_dir",
    errno.EROFS: "the file system is read-only. Choose an output_dir on another one",
    errno.ENAMETOOLONG: "the name is too long for the file system. Choose a shorter output_dir",
    errno.EISDIR: "a folder stands where the file should go. Move it away",
    errno.ENOTDIR: "a file stands where a folder should be. Move it away, or choose another output_dir",
    errno.ELOOP: "its links lead round in a circle. Remove them, or choose another output_dir",
    errno.ENOLCK: "the file system has no locks, which keep a second run out. Choose an output_dir on a local disk",
    errno.ENOTSUP: "the file system has no locks, which keep a second run out. Choose an output_dir on a local disk",
}


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turns an OSError into a RunDirectoryError that says which file, why and what to do."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, f"{error.strerror or error}. Check the disk and the folder")
        raise RunDirectoryError(f"{path} was not written: {remedy}.") from error


def to_json(name: str, data: Mapping[str, Any], indent: int | None = None) -> str:
    """Strict JSON of a record of file `name`. Raises RunDirectoryError naming the key of a NaN, an infinity or a foreign type."""
    # ensure_ascii: a model can emit lone surrogates and line separators, and a log line must stay one line of valid UTF-8
    return json.dumps(_plain_mapping(data, f"{name}: "), allow_nan=False, ensure_ascii=True, indent=indent)


def _plain_mapping(data: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    for key in data:
        if not isinstance(key, str):
            raise RunDirectoryError(f"{prefix}the key {key!r} is a {type(key).__name__}. Keys must be strings.")
    return {key: _plain(value, prefix + key) for key, value in data.items()}


def _plain(value: Any, where: str) -> Any:
    """The value as dicts, lists and scalars. Raises RunDirectoryError at the first that strict JSON cannot hold."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RunDirectoryError(f"{where} is {value}, and a log holds finite numbers only. Find what made it, or leave the key out.")
        return float(value)
    if isinstance(value, Mapping):
        return _plain_mapping(value, f"{where}.")
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise RunDirectoryError(f"{where} is a {type(value).__name__}, which JSON cannot hold. Pass a number, string, list or mapping.")


def append_whole(path: Path, data: bytes) -> None:
    """Append all of `data` or, when the disk refuses, none of it."""
    with translated(path):
        append_all(path, data)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a mixture."""
    with translated(path):
        write_whole(path, text.encode())


def cut_torn_line(path: Path) -> None:
    """Drop what a crash left after the last newline; make the log if it is missing."""
    with translated(path), path.open("a+b") as log:
        log.seek(0)
        whole = 0
        for line in log:
            if line.endswith(b"\n"):
                whole += len(line)
        if whole < log.tell():
            log.truncate(whole)


def check_place(path: Path, deepest: str) -> Path:
    """The nearest folder that is there, where `path` and `deepest` inside it could be made. Leaves nothing behind.

    Raises RunDirectoryError where they could not: a file or a broken link in the way, names too long, no right to write.
    """
    with translated(path):
        folder, missing = _nearest_folder(path)
        for name in (folder / part for part in missing):
            with suppress(FileNotFoundError):
                name.lstat()
        with suppress(FileNotFoundError):
            (path / deepest).lstat()
        # asked by doing it: rights alone do not tell of a file system that is read-only, or that takes no folders at all
        probe = folder / f".writable-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    return folder


def _nearest_folder(path: Path) -> tuple[Path, list[str]]:
    """The folder, and the names below it that are missing."""
    folder, missing = path.absolute(), []
    while not folder.exists():
        if folder.is_symlink():
            raise RunDirectoryError(f"{folder} is a link that leads nowhere. Remove it, or choose another output_dir.")
        missing.append(folder.name)
        folder = folder.parent
    if not folder.is_dir():
        raise RunDirectoryError(f"{folder} is a file, so {path} cannot be made inside it. Choose another output_dir.")
    return folder, missing


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raise RunDirectoryError when the disk of `folder` has not the room that a run needs."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise RunDirectoryError(
            f"the disk of {folder} has {free / 1e6:.0f} MB free; the run needs about {needed_bytes / 1e6:.0f} MB. "
            "Free some room, or choose an output_dir on another disk."
        )
