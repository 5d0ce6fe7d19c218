"""Who writes a run directory now, and on which device: asked from outside, without keeping anybody out. The lock itself is events.py's."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gemma_grpo.run_layout import EVENTS, HOLDER, LOCK, RUN, WRITER


def writer_of(run_dir: Path) -> str | None:
    """The process that writes the run, such as "process 12 on host one"; None where none does, or where this user may not ask."""
    if not (run_dir / LOCK).is_file():
        return None
    try:
        with FileLock(run_dir / LOCK, timeout=0):  # for a moment: there is no other way to ask
            return None
    except Timeout:  # an OSError too, so it comes first
        return _named(run_dir / WRITER)
    except OSError:
        return None


def told_writer(run_dir: Path) -> str:
    """Whether the process that the run's own file names is "here", "elsewhere" or "gone". Takes no lock: it may be asked all the time."""
    try:
        found = HOLDER.fullmatch((run_dir / WRITER).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        found = None
    if found is None:
        return "gone"
    if found[2] != socket.gethostname():
        return "elsewhere"
    try:
        os.kill(int(found[1]), 0)
    except (ProcessLookupError, OverflowError):
        return "gone"
    except PermissionError:
        pass  # another user's, and there
    return "here"


def device_of(run_dir: Path) -> dict[str, str]:
    """What the run's last start says of its device: "device" and, for a card, "uuid"; of older runs the device alone, or nothing."""
    started = [event for event in _events(run_dir / EVENTS) if event.get("kind") == "start" and "device" in event]
    if started:
        return {name: str(started[-1][name]) for name in ("device", "uuid") if name in started[-1]}
    try:
        return {"device": str(json.loads((run_dir / RUN).read_text(encoding="utf-8"))["environment"]["device"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _named(path: Path) -> str:
    try:
        found = HOLDER.fullmatch(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:  # it has the lock, and has not written its name yet
        found = None
    return found[0].strip() if found else "another process"


def _events(path: Path) -> list[Mapping[str, Any]]:
    """The log's lines, without one that is being written."""
    if not path.is_file():
        return []
    found: list[Mapping[str, Any]] = []
    with path.open(encoding="utf-8", errors="replace") as log:
        for line in log:
            if '"start"' in line:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                found += [event] if isinstance(event, dict) else []
    return found
