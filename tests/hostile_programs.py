"""The programs of hostile_programs.txt, by name: what each tries, and how it may be reported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Hostile(NamedTuple):
    """One program, with one test: that win() returns what is expected, which it must not."""

    source: str
    """With @names@ for what is outside."""
    kinds: tuple[str, ...]
    """The reports that are right for it."""
    expected: object = 42


def _read(text: str) -> Iterator[tuple[str, Hostile]]:
    for part in text.split("\n### ")[1:]:
        head, _, source = part.partition("\n")
        name, kinds, *expected = (word.strip() for word in head.split("|"))
        yield name, Hostile(f"{source.strip()}\n", tuple(kinds.split()), *map(ast.literal_eval, expected))


HOSTILE: dict[str, Hostile] = {
    **dict(_read(Path(__file__).with_suffix(".txt").read_text(encoding="utf-8"))),
    "nested brackets": Hostile("(" * 50000 + ")" * 50000, ("syntax", "crash", "memory")),
    "a zero byte": Hostile("x = 1\0\n", ("syntax",)),
}
