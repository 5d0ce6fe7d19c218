"""What pages name is there: functions and files of the method, texts of the troubleshooting, metrics of a run, settings, verbs."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from markdown_blocks import ROOT, pages

PACKAGE = ROOT / "gemma_grpo"
REFERENCE = re.compile(r"`((?:[\w-]+/)*[\w-]+\.py): (\w+(?:\.\w+)?)`")
FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|ipynb|json))`")
ELSEWHERE = ("step-00000012/",)


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


# ---- functions and files


@cache
def names_in(path: Path) -> frozenset[str]:
    """Functions, classes, methods and constants that a file defines."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


def missing_reference(file: str, name: str) -> str:
    """What is wrong with `file: name`; empty when it is there."""
    path = next((folder / file for folder in (PACKAGE, ROOT) if (folder / file).is_file()), None)
    if path is None:
        return f"there is no {file}"
    return "" if name in names_in(path) else f"{file} has no {name}"


REFERENCES = sorted({(path.name, *found) for path in pages() for found in REFERENCE.findall(path.read_text(encoding="utf-8"))})


@pytest.mark.parametrize(("page", "file", "name"), REFERENCES)
def test_a_function_that_a_page_names_exists(page: str, file: str, name: str) -> None:
    assert not missing_reference(file, name)


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_a_file_that_a_page_names_exists(path: Path) -> None:
    named = {name for name in FILE.findall(path.read_text(encoding="utf-8")) if not name.startswith(("runs/", "~"))}
    missing = [name for name in sorted(named) if not any((folder / name).exists() for folder in (ROOT, PACKAGE, ROOT / "tests"))]
    assert not missing


def test_references_are_checked() -> None:
    assert len(REFERENCES) > 50
    assert missing_reference("grpo/loss.py", "ppo_loss") == ""
    assert missing_reference("grpo/loss.py", "pop_loss") == "grpo/loss.py has no pop_loss"
    assert missing_reference("grpo/los.py", "ppo_loss") == "there is no grpo/los.py"


EQUATIONS = ("Rewards", "Advantages", "Losses", "KL")


@pytest.mark.parametrize("section", EQUATIONS)
def test_every_equation_stands_beside_the_function_that_computes_it(section: str) -> None:
    body = text_of("method.md").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = [line for line in body.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 5
    assert [row for row in rows if not REFERENCE.search(row.rsplit(" | ", 1)[1])] == []


# ---- error texts


@cache
def texts_of_the_package() -> tuple[str, ...]:
    """Every text in the sources; what is filled in stands as \\0."""
    return tuple(text for path in sorted(PACKAGE.rglob("*.py")) for text in _texts(ast.parse(path.read_text(encoding="utf-8"))))


def _texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def is_said(quoted: str) -> bool:
    """Whether some text of the package has these words in this order; `...` stands for anything."""
    pattern = re.compile(".*?".join(re.escape(part) for part in quoted.strip(".").split("...") if part.strip()), re.DOTALL)
    return any(pattern.search(text) for text in texts_of_the_package())


QUOTED: list[str] = re.findall(r"^### `(.+)`$", text_of("troubleshooting.md"), re.MULTILINE)


@pytest.mark.parametrize("quoted", QUOTED)
def test_an_error_text_is_the_programs_own(quoted: str) -> None:
    assert is_said(quoted), quoted


def test_a_text_that_nobody_says_is_seen() -> None:
    assert len(QUOTED) > 35
    assert not is_said("the model is tired (...). Let it sleep.")
    assert is_said("... is gated and you are not logged in.")


@pytest.mark.parametrize("quoted", QUOTED)
def test_an_entry_says_what_to_do(quoted: str) -> None:
    entry = text_of("troubleshooting.md").partition(f"### `{quoted}`\n")[2].partition("\n#")[0]
    assert len(entry.split()) >= 5


# ---- metrics


def documented_metrics() -> set[str]:
    """Names of the tables' first cells: `a, b` are two, `a/b, /c` are a/b and a/c."""
    names: set[str] = set()
    for line in text_of("metrics.md").splitlines():
        if not line.startswith("| ") or line.startswith(("| name", "| ---")):
            continue
        first = ""
        for word in line.split("|")[1].strip().split(", "):
            first = f"{first.rsplit('/', 1)[0]}{word}" if word.startswith("/") else word
            names.add(first)
    return names


def undocumented(metrics: set[str]) -> set[str]:
    """Metrics of a run without a row, whatever its rewards are called."""
    plain = {re.sub(r"^rewards/[^/]+/", "rewards/NAME/", name) for name in metrics}
    return plain - documented_metrics() - {"step"}


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_metric_of_a_run_is_documented(furnished: Path) -> None:
    run = furnished / "runs" / "NAME"
    assert undocumented({name for line in lines(run / "metrics.jsonl") for name in line}) == set()
    looked = {name for line in lines(run / "witnesses.jsonl") for name in dict(line["metrics"])}  # type: ignore[call-overload]
    assert undocumented(looked) == set()
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert undocumented({name for name, value in evaluation.items() if isinstance(value, dict) and "gain" in value}) == set()
    assert undocumented({"reward", "nobody/wrote/this"}) == {"nobody/wrote/this"}


def test_every_row_of_the_metrics_has_a_unit_and_a_sentence() -> None:
    rows = [line for line in text_of("metrics.md").splitlines() if line.startswith("| ") and not line.startswith(("| name", "| ---"))]
    assert len(rows) > 35
    assert [row for row in rows if not all(cell.strip() for cell in row.split("|")[1:4])] == []
