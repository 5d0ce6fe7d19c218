"""Whatever a model, a dataset, a recipe or an error says: no terminal obeys it. Every place where the command line prints such text."""

from __future__ import annotations

import ast
import io
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile_texts import BEL, ESC
from hostile_texts import TERMINAL as PAYLOADS
from rich.console import Console

import gemma_grpo.cli
from gemma_grpo.cli import run
from gemma_grpo.cli.errors import report
from gemma_grpo.cli.printing import complain, say
from gemma_grpo.cli.training import plan_lines
from gemma_grpo.monitor.terminal import ProgressView
from gemma_grpo.types import Completion, Message, Prompt, RolloutGroup, ScoredGroup, StepRecord


def test_there_are_fifty_payloads() -> None:
    assert len(set(PAYLOADS)) >= 50


def harmful(text: str) -> set[str]:
    """Characters that a terminal obeys, hides or reorders."""
    return {char for char in text if char != "\n" and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")}


def test_every_payload_would_do_harm() -> None:
    assert all(harmful(payload) for payload in PAYLOADS)


ALL = " | ".join(PAYLOADS)


def scored_group(text: str) -> ScoredGroup:
    messages: tuple[Message, ...] = ({"role": "user", "content": text},)
    prompt = Prompt(text, text, messages, (2, 7), "c1", {text: text})
    completions = tuple(Completion(text, (5, 106), (-0.1, -0.2), "stop") for _ in range(2))
    return ScoredGroup(RolloutGroup(prompt, completions, 3), (1.0, 0.0), {text: (1.0, 0.0)}, (0.5, -0.5))


def shown_by_view(text: str, *, live: bool) -> str:
    """All that a run's view writes with this text in every place that takes one."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=live, width=400, height=60, highlight=False, markup=False, emoji=False, color_system=None)
    with ProgressView(console) as view:
        view.phase(text, text)
        view.note(text)
        view.warn(text)
        view.table(text, [[text, text], [text, text]])
        view.step(StepRecord(1, {text: 0.5}, {"reward": 0.1, text: 1.0}), 2, scored_group(text))
    return out.getvalue()


@pytest.mark.parametrize("payload", PAYLOADS, ids=ascii)
def test_a_view_without_a_terminal_shows_every_payload_as_escapes(payload: str) -> None:
    shown = shown_by_view(payload, live=False)
    assert not harmful(shown)
    assert shown.isascii()


@pytest.mark.parametrize("payload", PAYLOADS, ids=ascii)
def test_the_live_view_sends_nothing_of_a_payload(payload: str) -> None:
    # the view itself moves the cursor and clears lines: beside a harmless text it may send no other control sequence
    def sequences(text: str) -> set[str]:
        parts = text.split(ESC)[1:]
        return {next((part[: end + 1] for end, char in enumerate(part) if char.isalpha()), part) for part in parts}

    shown, plain = shown_by_view(payload, live=True), shown_by_view("harmless", live=True)
    assert sequences(shown) <= sequences(plain) | {"[1A", "[2K", "[?25l", "[?25h"}
    assert harmful(shown) <= {ESC, "\r"}
    assert shown.count(BEL) == 0


@pytest.mark.parametrize("payload", PAYLOADS, ids=ascii)
def test_errors_with_or_without_a_trace_show_every_payload_as_escapes(payload: str, capsys: pytest.CaptureFixture[str]) -> None:
    errors = [ValueError(payload), RuntimeError(payload), OSError(28, payload, payload), KeyError(payload)]
    for error in errors:
        for debug in (False, True):
            report(error, debug=debug)
    say(payload)
    complain(payload)
    printed = capsys.readouterr()
    assert not harmful(printed.out + printed.err)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A dataset whose every text holds every payload."""
    path = tmp_path / "rows.jsonl"
    row = {"prompt": f"hi {ALL}", "chosen": f"good {ALL}", "rejected": f"bad {ALL}", "source": f"from {ALL}", f"column {ALL}": ALL}
    path.write_text("".join(json.dumps({**row, "prompt": f"{n} {row['prompt']}"}) + "\n" for n in range(8)), encoding="utf-8")
    return path


def test_previews_and_statistics_of_a_dataset_are_harmless(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["data", "preview", str(rows)], ["data", "stats", str(rows)], ["data", "stats", str(rows), "--json"]):
        assert run(words) == 0
        printed = capsys.readouterr()
        assert not harmful(printed.out + printed.err)
        assert "owned" in printed.out or "stats" in words  # it was shown, as escapes


def test_a_dry_run_shows_its_prompts_harmlessly(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = scored_group(ALL).group.prompt
    canned = {"prompts": 1, "too_long": 1, "won": 1, "lost": [], "parts": {ALL: (1.0, 0.0)}, "not_asked": [ALL], "warnings": [ALL]}
    plan = {"plan": ALL, "steps": 2, "counts": {ALL: ALL}, "rewards": {ALL: 1.0}, "canned": canned, "prompts": [prompt]}
    say(*plan_lines(plan))
    printed = capsys.readouterr().out
    assert not harmful(printed)
    assert "owned" in printed


@pytest.mark.parametrize("payload", PAYLOADS, ids=ascii)
def test_names_that_a_user_was_made_to_paste_are_harmless(payload: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"model_name={payload}", f"dataset={payload}", f"output_dir={payload}", f"{payload}=1", f"reward={payload}", payload]
    for setting in settings:
        run(["train", "miniature", setting, "seed=x"])  # the last stops it before anything is loaded
    for words in (["train"], [], ["data", "preview"], ["evaluate"], ["report"], ["plan"], ["recipes", "show"]):
        run([*words, payload])
    printed = capsys.readouterr()
    assert not harmful(printed.out + printed.err)


def prints(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write", "typer.echo"):
            yield node.lineno


def test_the_command_line_prints_through_one_file() -> None:
    folder = Path(gemma_grpo.cli.__file__).parent
    found = {path.name: list(prints(ast.parse(path.read_text(encoding="utf-8")))) for path in folder.glob("*.py")}
    assert len(found.pop("printing.py")) == 6
    assert len(found) > 10
    assert not {name: lines for name, lines in found.items() if lines}
