"""`gemma-grpo recipes`: the recipes that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma_grpo.cli.printing import say
from gemma_grpo.config import ConfigError, Problem, find_recipe, shipped_recipes

app = typer.Typer(help="The recipes that ship with the package.", no_args_is_help=True, rich_markup_mode=None)

Name = Annotated[str, typer.Argument(help="A name from `recipes list`.")]


@app.command("list")
def list_recipes() -> None:
    """Name each shipped recipe with its first line."""
    recipes = shipped_recipes()
    width = max(map(len, recipes), default=0)
    for name, path in recipes.items():
        with path.open(encoding="utf-8") as file:
            say(f"{name:<{width}}  {file.readline().lstrip('# ').strip()}")


@app.command()
def show(name: Name) -> None:
    """Print a recipe."""
    say(_shipped(name).read_text(encoding="utf-8"), end="")


@app.command()
def copy(name: Name, destination: Annotated[Path, typer.Argument(help="File to write; it must not exist.")]) -> None:
    """Copy a recipe to a file of yours."""
    text = _shipped(name).read_text(encoding="utf-8")
    target = destination / f"{name}.yaml" if destination.is_dir() else destination
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise _problem(target, "exists already. Choose another name, or delete it first.") from None
    except OSError as error:
        raise _problem(target, f"cannot be written ({error.strerror}). Choose another place.") from None
    say(f"{target}   next: gemma-grpo train {target}")


def _shipped(name: str) -> Path:
    path = find_recipe(name)
    if path not in shipped_recipes().values():
        raise _problem(path, f"is not a shipped recipe's name. Shipped are {', '.join(shipped_recipes())}.")
    return path


def _problem(path: Path, what: str) -> ConfigError:
    return ConfigError([Problem(str(path), None, "", what)])
