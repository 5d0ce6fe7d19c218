"""The recipes that come with the package, by name. Reads no recipe (recipe.py)."""

from __future__ import annotations

import difflib
from pathlib import Path

from gemma_grpo.config.problems import ConfigError, Problem

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_recipes() -> dict[str, Path]:
    """Name -> file, in alphabetical order: gemma_grpo/recipes in an installed package, recipes/ in a checkout."""
    folder = next((folder for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if folder.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe given as a path or as a shipped recipe's name. Raises ConfigError, naming the nearest, when it is neither.

    A file here hides a shipped recipe of its name, a folder does not: it can be no recipe.
    """
    path, shipped = Path(recipe), shipped_recipes()
    if str(recipe) in shipped and not path.is_file():
        return shipped[path.name]
    if path.exists() or len(path.parts) != 1 or path.suffix in (".yaml", ".yml"):
        return path
    near = difflib.get_close_matches(path.name, shipped, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    what = f"no such recipe. {hint}Shipped are {', '.join(shipped)}; or give a file's path."
    raise ConfigError([Problem(str(recipe), None, "", what)])
