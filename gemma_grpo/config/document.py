"""A recipe's text as plain values with line numbers: YAML read safely, duplicates and anchors refused. Knows no setting."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

MAX_BYTES = 32_768
"""The dumped settings are 3 KB. A megabyte can keep PyYAML busy for a minute."""
_MAX_DEPTH = 20

KeyPath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """Something wrong with the text itself, before any setting is looked at."""

    line: int
    """Counted from 1."""
    key: str
    what: str


@dataclass(frozen=True, slots=True)
class Document:
    """The values of a recipe, the line of each, and what is wrong with the text."""

    values: dict[str, Any]
    lines: dict[KeyPath, int]
    marks: tuple[Mark, ...]


class _Scalars:
    """YAML 1.2's core scalars for reading and writing alike."""

    # PyYAML's own (YAML 1.1) reads 1e-5 as a string, no as False, 1:30 as 90, 010 as 8 and 2026-11-22 as a date
    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # PyYAML's own name and shape


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("int", r"[-+]?[0-9]{1,18}", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    for _letter in (*_first, *([""] if _tag == "null" else [])):
        _Scalars.yaml_implicit_resolvers.setdefault(_letter, []).append((f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$")))


class _Loader(_Scalars, yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars, whose keys are always texts: `1:` and `true:` are names, `<<` merges nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        return {_name(key): self.construct_object(value, deep=True) for key, value in node.value}


class _Dumper(_Scalars, yaml.SafeDumper):
    """SafeDumper that quotes exactly what _Loader would misread."""


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # plain and single-quoted style fold the line breaks that only YAML knows (U+0085, U+2028, U+2029); double quotes escape them
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text_node)


def _name(key: yaml.Node) -> str:
    return key.value if isinstance(key, yaml.ScalarNode) else "[...]"


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # not PyYAML's: it reads a leading 0 as octal


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def write_document(values: dict[str, Any]) -> str:
    """YAML that read_document reads back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_document(text: str) -> Document:
    """The values of a recipe's text. Never raises: what is wrong is in `marks`."""
    try:
        marks = tuple(_refused(text))
        if marks:
            return Document({}, {}, marks)
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if not isinstance(root, yaml.MappingNode):
                return Document({}, {}, (Mark(1, "", _not_a_mapping(root)),))
            lines: dict[KeyPath, int] = {}
            duplicates = tuple(_collect(root, (), lines))
            return Document(loader.construct_document(root), lines, duplicates)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        return Document({}, {}, (_syntax(error, text),))


def read_scalar(text: str) -> Any:
    """The value of `key=VALUE`: one YAML scalar, or a flow list or mapping when it starts with a bracket.

    Raises ValueError when a bracket or a quote is opened and the rest is not YAML.
    """
    if text[:1] in ("[", "{", "'", '"'):
        return _bracketed(text)
    loader = _Loader("")
    try:  # no parse: dataset=*.jsonl is a text, not an alias, and output_dir=#1 is not a comment
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        return loader.construct_object(yaml.ScalarNode(tag, text))
    finally:
        loader.dispose()


def _bracketed(text: str) -> Any:
    try:
        if any(_refused(text)):
            raise yaml.YAMLError("anchors, aliases or deep nesting")
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            assert root is not None  # a bracket or a quote was opened
            twice = next(_collect(root, (), {}), None)
            if twice is None:
                return loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        remedy = "Quote the whole for the shell, such as 'key=[a, b]'."
        raise ValueError(f"{text!r} opens a bracket or a quote but is not YAML. {remedy}") from error
    raise ValueError(f"{text!r} gives {twice.key} twice. Keep one.")


def _refused(text: str) -> Iterator[Mark]:
    """Anchors, aliases and merges (which can blow up), and nesting no recipe needs, by the event stream alone."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            yield Mark(line, "", "anchors and aliases (& and *) are not read in recipes. Write the value out, or in quotes.")
        if getattr(event, "tag", None):
            yield Mark(line, "", "tags (!) are not read in recipes. Write the plain value, or in quotes.")
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            depth += 1
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            depth -= 1
        if depth > _MAX_DEPTH:
            yield Mark(line, "", f"nested deeper than {_MAX_DEPTH} levels; settings are at most 2 deep.")
            return


def _collect(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> Iterator[Mark]:
    """Fill `lines` with the line of every key, at any depth; yield the keys given twice. An item of a list is named by its number."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _collect(item, (*path, str(index)), lines)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        here = (*path, _name(key))
        line = key.start_mark.line + 1
        if here in lines:
            yield Mark(line, ".".join(here), f"given twice, first on line {lines[here]}. Keep one.")
            continue
        lines[here] = line
        yield from _collect(value, here, lines)


def _not_a_mapping(root: yaml.Node | None) -> str:
    if root is None:
        return "the recipe is empty. Start from one of `gemma-grpo recipes list`."
    return "a recipe is a list of `name: value` lines. Start from one of `gemma-grpo recipes list`."


def _syntax(error: yaml.YAMLError, text: str) -> Mark:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        what = f"not YAML: {error.problem or error.context}. Check the indentation, the colon and the quotes here."
        last = max(1, len(text.rstrip().splitlines()))  # an open bracket is noticed at the end of the file
        return Mark(min(mark.line + 1, last) if mark else 1, "", what)
    position = getattr(error, "position", 0)
    line = text.count("\n", 0, position if isinstance(position, int) else 0) + 1
    return Mark(line, "", "holds a control character. A recipe is plain UTF-8 text.")
