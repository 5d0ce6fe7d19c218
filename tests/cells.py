"""The sandbox's processes, as anybody on the machine sees them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def inside(trainer: int | None = None) -> list[int]:
    """Processes of the sandboxes of a trainer (this process), whoever their parent is now: they carry its number in their command line."""
    number = str(trainer or os.getpid()).encode()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            if any(word.endswith(b"cell.py") for word in words) and number in words:
                found.append(int(name))
    return sorted(found)
