"""Which of a run's policies can be played with: the final adapter, the one the witness liked best, and those of its checkpoints.

Reads names and two small files; whether an adapter is whole is found out when it is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FINAL, BEST = "adapter", "best"
_WEIGHTS = "adapter_model.safetensors"
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy of a run."""

    name: str
    """What it is asked for by: "adapter", "best" or "step-00000012"."""
    folder: Path
    """A PEFT folder, inside a checkpoint for a step's."""
    about: str
    """A few words for a list."""

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint it is part of; None for the final and the best one."""
        return self.folder.parent if _STEP.fullmatch(self.name) else None


def choices(run_dir: str | Path) -> list[Choice]:
    """What is there, the final one first and the newest step before older ones. Raises ValueError where there is no run."""
    run = Path(run_dir)
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run} is not a run directory: it has no recipe.yaml. Name the folder a training run wrote, such as runs/demo-1.")
    steps = sorted((path for path in _folders(run / "checkpoints") if _STEP.fullmatch(path.name)), key=lambda path: _step(path.name))
    found = [Choice(FINAL, run / FINAL, "the final adapter"), Choice(BEST, run / BEST, _liked(run / BEST / "best.json"))]
    found += [Choice(path.name, path / "policy", f"after step {_step(path.name)}") for path in reversed(steps)]
    return [one for one in found if (one.folder / _WEIGHTS).is_file()]


def chosen(run_dir: str | Path, name: str) -> Choice:
    """The policy of that name; a step may be named "step-12" or by its folder. Raises ValueError, with what is there, for any other."""
    there = choices(run_dir)
    wanted = name.rstrip("/").removeprefix("checkpoints/")
    step = _STEP.fullmatch(wanted)
    for one in there:
        own = _STEP.fullmatch(one.name)
        if one.name == wanted or (step and own and int(step[1]) == int(own[1])):
            return one
    raise ValueError(f"{run_dir} has no adapter {name!r}. {_listed(there)}")


def _listed(there: Sequence[Choice]) -> str:
    if not there:
        return "It has none at all: wait for the run's first checkpoint, or train it to its end."
    return f"Choose among {', '.join(one.name for one in there)}."


def _folders(path: Path) -> list[Path]:
    return [inner for inner in path.iterdir() if inner.is_dir()] if path.is_dir() else []


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _liked(path: Path) -> str:
    """When the witness liked it; a file that says nothing is no reason not to load the adapter beside it."""
    try:
        return f"the one the witness liked best, after step {int(json.loads(path.read_text(encoding='utf-8'))['step'])}"
    except (OSError, ValueError, KeyError, TypeError):
        return "the one the witness liked best"
