"""A run directory keeps to itself: no link inside it may lead a run's writing or deleting out of it.

output_dir is the user's own choice and may be a link; what lies inside may have come with a copied or unpacked run. Owns that rule;
who writes asks before the first write. A link made while a run writes is not seen: who may do that may also write there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def link_out(folder: Path) -> str | None:
    """A sentence on the first link inside the folder that leads out of it, None where there is none. Follows no link."""
    root = os.path.realpath(folder)
    for path in _links(folder):
        target = os.path.realpath(path)
        if not Path(target).is_relative_to(root):
            return (
                f"{path} is a link to {target}, outside the run directory, where this run would write or delete. "
                "Remove the link, or move what it points to into the run directory."
            )
    return None


def _links(folder: Path) -> Iterator[str]:
    """Every link, in order; a folder that is not there has none."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_symlink():
            yield entry.path
        elif entry.is_dir(follow_symlinks=False):
            yield from _links(Path(entry.path))
