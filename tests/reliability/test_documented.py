"""What docs/reliability.md and SECURITY.md say is tested is there, and the figures are those of the results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reliability.__main__ import FIGURES, ROWS, table
from reliability.mutant_list import Mutant
from reliability.mutants import ALL
from reliability.writer_kills import RESULTS

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"tests/[\w/]+\.py(?:::\w+)?")
REFERENCES = sorted({match for name in ("docs/reliability.md", "SECURITY.md") for match in NAMED.findall((ROOT / name).read_text("utf-8"))})


def is_there(reference: str) -> bool:
    file, _, test = reference.partition("::")
    return (ROOT / file).is_file() and (not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_test_that_is_named_exists(reference: str) -> None:
    assert is_there(reference)


def test_something_is_named() -> None:
    assert len(REFERENCES) > 20
    assert not is_there("tests/test_checkpoint.py::test_that_nobody_wrote")


def test_every_row_of_the_matrix_for_one_device_has_its_tests() -> None:
    rows = re.findall(r"^\| ([A-E]\d+) \|.*\|(.*)\|$", FIGURES.path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    expected = {*(f"A{n}" for n in range(1, 11)), *(f"B{n}" for n in range(1, 11)), *(f"C{n}" for n in range(1, 10))}
    expected |= {*(f"D{n}" for n in range(1, 10)), *(f"E{n}" for n in range(1, 11))}
    assert {name for name, _ in rows} == expected
    assert [name for name, tests in rows if not NAMED.search(tests)] == []


def test_the_figures_are_those_of_the_results() -> None:
    text = FIGURES.path.read_text(encoding="utf-8")
    assert FIGURES.filled(text, table()) == text, "run python -m reliability"
    there = {f"reliability.{path.stem}" for path in RESULTS.glob("*.json")}
    assert there <= {f"reliability.{name}" for name in ROWS}
    assert there == set(re.findall(r"python -m (reliability\.\w+)` \|", table()))


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_planted_and_its_test_exists(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.new != mutant.old
    assert is_there(mutant.test)


def test_every_mutant_has_a_name_of_its_own() -> None:
    assert len({mutant.name for mutant in ALL}) == len(ALL) >= 15
