"""In which settings runs differ: what `compare` and the page show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_grpo.config import load_recipe


def differences(runs: Sequence[Path]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, with each run's value. Raises ConfigError where a recipe is none."""
    chosen = [_flat(load_recipe(run / "recipe.yaml").model_dump(mode="json")) for run in runs]
    names = [name for name in chosen[0] if name != "output_dir" and len({repr(one.get(name)) for one in chosen}) > 1]
    return {name: [one.get(name) for one in chosen] for name in names}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and name != "reward" else {prefix + name: value}
    return found
