"""Writes docs/configuration.md from GRPOConfig and docs/cli.md from the command line: `python scripts/write_reference.py`.

A test compares the committed pages with what this makes (tests/docs/test_reference.py).
"""

from __future__ import annotations

import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel

from gemma_grpo.cli.app import app
from gemma_grpo.config.base import TOO_MANY
from gemma_grpo.config.problems import ALIASES, shown
from gemma_grpo.config.schema import GRPOConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"
PROGRAM = "gemma-grpo"
WRITTEN = "<!-- written by python scripts/write_reference.py; do not edit -->"
_LIMITS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
_KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "null"}


# ---- settings


CONFIGURATION = """\
# Configuration

Every setting, as it stands in a recipe, in Python (`GRPOTrainer(learning_rate=1e-5, **{"kl.beta": 0.1})`)
and on the command line (`gemma-grpo train RECIPE kl.beta=0.1`).

What is wrong with settings is said all at once, with line, limit and the nearest name; an unknown key is an error, never ignored.
That each setting changes what it is for is tested one by one (`tests/config/test_every_key.py`).

TRL's names are taken where they mean the same: {aliases}."""

COMMAND_LINE = """\
# Command line

Every verb and what it takes; `gemma-grpo VERB --help` says the same.
`--debug` anywhere on the line prints the whole trace of an error, `--version` the version.

| exit code | what |
| --- | --- |
| 0 | done |
| 1 | failed while running |
| 2 | wrong usage, settings or data |
| 3 | preflight says no: it does not fit, or a line of `doctor` failed |
| 4 | no access: gated, private, missing or offline |
| 75 | stopped by a signal or `max_minutes`; the same command goes on |"""


def configuration_page() -> str:
    """Every setting: name, kind with its limits, default, and the sentence of its docstring."""
    parts = [WRITTEN, CONFIGURATION.replace("{aliases}", ", ".join(f"`{name}` for `{ours}`" for name, ours in ALIASES.items()))]
    for stage, model in stages():
        parts += [f"## {stage}" if stage else "## The run", _one_line(model.__doc__ or "")]
        parts.append(_table(["setting", "kind", "default", "what"], list(setting_rows(stage, model))))
    return "\n\n".join(parts) + "\n"


def stages() -> Iterator[tuple[str, type[BaseModel]]]:
    """(name, model) of the run's own settings, then of each stage."""
    yield "", GRPOConfig
    for name, field in GRPOConfig.model_fields.items():
        if _is_stage(field.annotation):
            yield name, typing.cast("type[BaseModel]", field.annotation)


def setting_rows(stage: str, model: type[BaseModel]) -> Iterator[list[str]]:
    for name, field in model.model_fields.items():
        if _is_stage(field.annotation):
            continue
        default = json.loads(json.dumps(field.default))  # a tuple as the list that a recipe writes
        text = "[" + ", ".join(map(str, default)) + "]" if isinstance(default, list) else shown(default).strip("'")
        dotted = f"{stage}.{name}" if stage else name
        yield [f"`{dotted}`", kind(field.annotation, field.metadata), f"`{text}`", _one_line(field.description or "")]


def kind(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    """A type as a reader of recipes would say it: choices, or a kind of value with its limits."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return kind(inner[0], inner[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(kind(one, metadata if one is not type(None) else ()) for one in inner)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is tuple:
        return f"list of {kind(inner[0])}"
    if origin is dict:
        return "names with numbers"
    limits = [text for limit in metadata for text in _limits(limit)]
    return " ".join([_KINDS[annotation], ", ".join(limits)]).strip()


def _limits(limit: Any) -> Iterator[str]:
    """Of one of pydantic's or annotated_types' limits."""
    for part in getattr(limit, "metadata", None) or [limit]:
        for name, text in _LIMITS.items():
            value = getattr(part, name, None)
            if value is not None and value != TOO_MANY:
                yield text.format(value)


def _is_stage(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


# ---- verbs


def cli_page() -> str:
    """Every verb with what it takes, as `--help` knows it."""
    parts = [WRITTEN, COMMAND_LINE]
    for name, command in verbs():
        rows = [_parameter_row(parameter) for parameter in command.params if parameter.name != "help"]
        parts += [f"## {PROGRAM} {name}", _one_line((command.help or "").split("\f")[0]), f"`{_usage(name, command)}`"]
        parts += [_table(["word", "default", "what"], rows)] if rows else []
    return "\n\n".join(parts) + "\n"


def verbs() -> list[tuple[str, Any]]:
    """(words, command) of every verb, in the order of --help."""
    return list(_verbs(typer.main.get_command(app), ()))


def _verbs(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, inner in getattr(command, "commands", {}).items():
        if hasattr(inner, "commands"):
            yield from _verbs(inner, (*words, name))
        else:
            yield " ".join((*words, name)), inner


def _usage(name: str, command: Any) -> str:
    words = [_metavar(parameter) for parameter in command.params if _is_argument(parameter)]
    options = [] if all(_is_argument(parameter) or parameter.name == "help" for parameter in command.params) else ["[OPTIONS]"]
    return " ".join([PROGRAM, name, *options, *words])


def _parameter_row(parameter: Any) -> list[str]:
    """The word as it is typed, its default, its help."""
    takes = "" if getattr(parameter, "is_flag", False) else f" {_metavar(parameter)}"
    word = f"`{_metavar(parameter)}`" if _is_argument(parameter) else ", ".join(f"`{name}{takes}`" for name in parameter.opts)
    default = parameter.default if isinstance(parameter.default, (int, float, str, Path)) else None
    return [word, "" if default is None or default is False else f"`{default}`", _one_line(parameter.help or "")]


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _metavar(parameter: Any) -> str:
    """As --help has it; without one of its own the parameter's name."""
    return str(parameter.metavar or parameter.name.upper())


# ---- both


def _one_line(text: str) -> str:
    """A docstring in one line, for Markdown: < begins no tag, a page that is named is a link."""
    line = " ".join(text.split()).replace("<", "&lt;")
    return re.sub(r"\bdocs/([\w-]+\.md)", r"[\1](\1)", line)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


PAGES = {"configuration.md": configuration_page, "cli.md": cli_page}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(f"docs/{name}", file=sys.stderr)


if __name__ == "__main__":
    main()
