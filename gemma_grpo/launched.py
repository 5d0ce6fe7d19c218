"""Whether a launcher such as torchrun started this process as one of several: known from its environment, before torch is loaded."""

from __future__ import annotations

import os


def world_size() -> int:
    """How many processes were started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return world_size() == 1 or os.environ.get("RANK", "0") == "0"
