"""A recipe file, key=value overrides or Python keywords -> GRPOConfig; every mistake reported at once. Defines no setting itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from gemma_grpo.config.base import Stage
from gemma_grpo.config.document import MAX_BYTES, KeyPath, read_document, read_scalar, write_document
from gemma_grpo.config.problems import ALIASES, ConfigError, Problem, explain, field_of, not_a_truth_value
from gemma_grpo.config.schema import GRPOConfig
from gemma_grpo.config.shipped import find_recipe
from gemma_grpo.escapes import printable

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

NO_OVERRIDES: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class _Entry:
    """One value with the place it was written."""

    value: Any
    origin: str
    line: int | None
    key: str
    """As written: TRL's name where that was used."""
    replaces: bool
    """Replaces everything a lower layer says under the same first name."""

    def problem(self, what: str, key: str | None = None) -> Problem:
        return Problem(self.origin, self.line, key or self.key, what)


_Layer = dict[KeyPath, _Entry]


def load_recipe(path: str | Path, overrides: Mapping[str, Any] = NO_OVERRIDES) -> GRPOConfig:
    """The settings of a recipe - a file, or a shipped recipe's name - with `overrides` (flat, dotted or nested names) on top.

    Raises ConfigError listing everything wrong with either.
    """
    path = find_recipe(path)
    origin = str(path)
    document = read_document(_text(path))
    problems = [Problem(origin, mark.line, mark.key, mark.what) for mark in document.marks]
    if problems and not document.values:
        raise ConfigError([*problems, *_problems_of(overrides, None)])
    recipe = _layer(document.values, origin, document.lines, problems)
    return _validated(_merged(recipe, _layer(overrides, "command line", {}, problems)), problems)


def build_config(overrides: Mapping[str, Any] = NO_OVERRIDES) -> GRPOConfig:
    """The settings of Python keywords alone. Raises ConfigError listing everything wrong with them."""
    problems: list[Problem] = []
    return _validated(_layer(overrides, "keyword", {}, problems), problems)


def dump_recipe(config: GRPOConfig) -> str:
    """Every setting as YAML; load_recipe on it gives an equal config."""
    return write_document(config.model_dump(mode="json"))


def parse_overrides(items: Sequence[str], recipe: str | Path | None = None) -> dict[str, Any]:
    """`key=value` words of a command line; values are YAML scalars, or flow lists and mappings.

    Raises ConfigError for all at once: with `recipe`, also for what is wrong in it and in the words that could be read.
    """
    overrides: dict[str, Any] = {}
    problems: list[Problem] = []
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not key:
            problems.append(Problem("command line", None, item, "is not key=value. Write a setting and its value, such as max_steps=20."))
        elif key in overrides:
            problems.append(Problem("command line", None, key, "given twice. Keep one."))
        else:
            try:
                overrides[key] = read_scalar(text)
            except ValueError as error:
                problems.append(Problem("command line", None, key, str(error)))
    if problems:
        raise ConfigError([*problems, *_problems_of(overrides, recipe)])
    return overrides


def _text(path: Path) -> str:
    """The file's text, or a ConfigError saying why there is none."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _whole(path, "no such recipe. `gemma-grpo recipes list` names the shipped ones; or give a file's path.") from None
    except IsADirectoryError:
        raise _whole(path, "is a folder; a recipe is a YAML file. A run's recipe is its recipe.yaml.") from None
    except OSError as error:
        raise _whole(path, f"cannot be read ({error.strerror}). Check its permissions.") from error
    if len(data) > MAX_BYTES:
        raise _whole(path, f"is larger than {MAX_BYTES} bytes; a recipe is a page of settings. Is this the dataset?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([Problem(str(path), line, "", "is not UTF-8 text. Save the recipe as UTF-8.")]) from error


def _whole(path: Path, what: str) -> ConfigError:
    return ConfigError([Problem(str(path), None, "", what)])


def _problems_of(overrides: Mapping[str, Any], recipe: str | Path | None) -> tuple[Problem, ...]:
    """What else is wrong, when an error is certain already: in the recipe and the overrides, or without one in the overrides alone."""
    problems: list[Problem] = []
    try:
        if recipe is not None:
            load_recipe(recipe, overrides)
        else:
            _validated(_layer(overrides, "command line", {}, problems), problems)
    except ConfigError as error:
        return error.problems
    return ()


def _layer(values: Mapping[str, Any], origin: str, lines: Mapping[KeyPath, int], problems: list[Problem]) -> _Layer:
    """One source's values under our own names; a setting given twice under different spellings is a problem."""
    layer: _Layer = {}
    for written, value, replaces in _leaves(values):
        first, *rest = ".".join(written).split(".", 1) if _is_setting(written[0]) else written
        path = (ALIASES.get(first, first), *rest)
        entry = _Entry(value, origin, lines.get(written), ".".join(written), replaces)
        clash = next((layer[known] for known in (path, path[:1]) if known in layer), None)
        if clash is not None:
            place = f" on line {clash.line}" if clash.line else ""
            problems.append(entry.problem(f"sets the same as {printable(clash.key)}{place}. Keep one."))
            continue
        layer[path] = entry
    return layer


def _leaves(values: Mapping[str, Any]) -> Iterator[tuple[KeyPath, Any, bool]]:
    """(path as written, value, whether it replaces): a stage's mapping sets the names in it, any other mapping is one value."""
    for key, value in values.items():
        if not isinstance(value, Mapping) or not value:
            yield (key,), value, "." not in key
            continue
        field = field_of((key,))
        is_stage = field is not None and isinstance(field.default, Stage)
        for name, inner in value.items():
            yield (key, str(name)), inner, not is_stage


def _is_setting(key: str) -> bool:
    return field_of((key.split(".")[0],)) is not None


def _merged(below: _Layer, above: _Layer) -> _Layer:
    """`above` wins: a value replaces the whole setting, a dotted name or a stage's mapping only what it names."""
    replaced = {path[0] for path, entry in above.items() if entry.replaces}
    named = {path[0] for path in above if len(path) > 1}
    kept = {
        path: entry
        for path, entry in below.items()
        if path[0] not in replaced and not (len(path) == 1 and entry.value is None and path[0] in named)
    }
    return {**kept, **above}


def _validated(layer: _Layer, problems: list[Problem]) -> GRPOConfig:
    found = list(problems)
    usable = dict(layer)
    for path, entry in layer.items():
        field = field_of(path)
        if isinstance(entry.value, bool) and field is not None and field.annotation is not bool:
            found.append(entry.problem(not_a_truth_value(entry.value, path)))
            del usable[path]
    try:
        config = GRPOConfig.model_validate(_tree(usable))
    except ValidationError as error:
        found.extend(_problem(layer, details) for details in error.errors(include_url=False))
        raise ConfigError(found) from None
    if found:
        raise ConfigError(found)
    return config


def _tree(layer: _Layer) -> dict[str, Any]:
    tree: dict[str, Any] = {path[0]: entry.value for path, entry in layer.items() if len(path) == 1}
    for path, entry in layer.items():
        if len(path) > 1:
            stage = tree.setdefault(path[0], {})
            if isinstance(stage, dict):  # `lora: 5` below lora.r=8 from above: pydantic names the 5
                stage[path[1]] = entry.value
    return tree


def _problem(layer: _Layer, details: ErrorDetails) -> Problem:
    path = tuple(part for part in details["loc"] if isinstance(part, str))
    what = explain(details, path)
    if not path:  # two settings disagree: the message begins with the one to change
        name, _, rest = what.partition(" ")
        path, what = tuple(name.split(".")), rest
    entry = _entry_at(layer, path)
    if entry is None:
        return Problem("defaults", None, ".".join(path), what)
    return entry.problem(what, entry.key if path in layer else ".".join(path))


def _entry_at(layer: _Layer, path: KeyPath) -> _Entry | None:
    for end in range(len(path), 0, -1):
        if path[:end] in layer:
            return layer[path[:end]]
    inside = [entry for known, entry in layer.items() if known[: len(path)] == path]
    return inside[0] if inside else None
