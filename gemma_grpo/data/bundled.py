"""The prompt sets that ship with the package, one for each application, and the replies that stand beside each prompt for a dry run.

Written for this package. A row has a prompt, the columns its rewards read, `chosen`, a reply that deserves a high score, and `bad`, one
that must not get it. Owns the files and their names; what a row means is prompts.py's.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, TypeGuard

from gemma_grpo.data.json_files import jsonl_rows
from gemma_grpo.data.sources import DataError
from gemma_grpo.types import Prompt

PREFIX = "bundled:"
FOLDER = Path(str(resources.files("gemma_grpo.data"))) / "bundled"


def is_bundled(dataset: Any) -> TypeGuard[str]:
    """Whether a dataset's name is one of "bundled:NAME"."""
    return isinstance(dataset, str) and dataset.startswith(PREFIX)


def unprefixed(dataset: str) -> str:
    """The name without "bundled:", for folders."""
    return dataset.removeprefix(PREFIX)


def bundled_names() -> list[str]:
    """What can stand behind "bundled:"."""
    return sorted(path.stem for path in FOLDER.glob("*.jsonl"))


def bundled_rows(dataset: str) -> list[dict[str, Any]]:
    """The rows of "bundled:NAME". Raises DataError for a name nobody knows, with the nearest."""
    name, known = unprefixed(dataset), bundled_names()
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"Did you mean {PREFIX}{near[0]}? " if near else ""
        raise DataError(f"no prompt set {dataset!r} is bundled. {hint}Bundled are {', '.join(PREFIX + one for one in known)}.")
    return [{"source": name, **row} for _, row in jsonl_rows(FOLDER / f"{name}.jsonl")]


def canned_replies(prompt: Prompt) -> tuple[str, str] | None:
    """(good, bad) replies that stand beside a prompt; None where its row has none."""
    good, bad = prompt.columns.get("chosen"), prompt.columns.get("bad")
    return (good, bad) if isinstance(good, str) and isinstance(bad, str) else None
