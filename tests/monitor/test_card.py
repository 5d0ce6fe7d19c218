"""Laws of the model card: its YAML says what the run says, and no text of a run becomes Markdown, HTML or YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from written_runs import look, write_run

from gemma_grpo.config import build_config, dump_recipe
from gemma_grpo.monitor.card import as_text, model_card
from gemma_grpo.run_layout import RECIPE

HOSTILE = (
    "---\nbase_model: evil/x\n---\n# <script>alert(1)</script> [a](http://evil.example) ![b](http://evil.example/c) `d` | e | \x1b[2J\u202e"
)
RECORD: dict[str, Any] = {
    "export_from_policy": {"tokens": 90, "mean": 1e-6, "largest": 4e-6, "agreement": 1.0},
    "policy_from_base": {"tokens": 90, "mean": 0.25, "largest": 1.0, "agreement": 0.9},
    "merged": {"changed": 10, "numbers": 12, "kept": 0.97},
    "notes": ["a note"],
}


def parts(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and body, parted as the Hub does."""
    start, head, body = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(head), body


def markup(body: str) -> set[str]:
    """Kinds of tokens, inner ones too, of the body as CommonMark with tables and HTML."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body)
    return {inner.type for token in tokens for inner in (token, *(token.children or []))}


def run_of(folder: Path, **changes: Any) -> Path:
    run = write_run(folder, 3)
    config = build_config({"model_name": "google/gemma-3-4b-it", "dataset": "Anthropic/hh-rlhf", **changes})
    (run / RECIPE).write_text(dump_recipe(config), encoding="utf-8")
    return run


@pytest.mark.parametrize(
    ("kind", "relation", "library"), [("adapter", "adapter", "peft"), ("merged", "finetune", "transformers"), ("gguf", "finetune", None)]
)
def test_the_front_matter_is_what_the_hub_reads(tmp_path: Path, kind: str, relation: str, library: str | None) -> None:
    head, body = parts(model_card(run_of(tmp_path / "run"), kind, RECORD))
    assert head["base_model"] == "google/gemma-3-4b-it"
    assert head["base_model_relation"] == relation
    assert head.get("library_name") == library
    assert head["license"] == "gemma"
    assert head["datasets"] == ["Anthropic/hh-rlhf"]
    assert "https://ai.google.dev/gemma/terms" in body
    assert "one crowd worker's judgement" in body


def test_numbers_are_the_runs_with_their_intervals(tmp_path: Path) -> None:
    _, body = parts(model_card(run_of(tmp_path / "run"), "merged", RECORD))
    assert "| gold | 0.50 | 0.70 | +0.20 [0.10, 0.30] | 40 |" in body
    assert "97.0 % of the adapter's change" in body
    assert "1 alarms" in body
    assert "the reward rose, gold fell at step 3" in body


def test_a_run_that_nobody_evaluated_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2, evaluated=False)
    assert "This run was not evaluated" in model_card(run, "adapter", RECORD)


def test_a_local_base_is_named_by_no_hub_id(tmp_path: Path) -> None:
    head, _ = parts(model_card(write_run(tmp_path / "run", 2), "adapter", RECORD))
    assert "base_model" not in head
    assert head["license"] == "apache-2.0"


def spoiled(folder: Path, text: str) -> Path:
    """A run with this text wherever a card shows one."""
    run = run_of(folder) if not folder.exists() else folder
    data = {"status": text, "data": {text: text, "dropped": {text: text}}}
    (run / "run.json").write_text(json.dumps(data), encoding="utf-8")
    found = look(1, text, alarm=True)
    found["alarms"][0] |= {"text": text, "level": text}
    (run / "witnesses.jsonl").write_text(json.dumps(found) + "\n", encoding="utf-8")
    gold = {"before": 0.5, "after": 0.7, "gain": 0.2, "interval": [0.1, 0.3], "n": 40}
    win = {**gold, "judge": text}
    kinds = {text: {"gold": {**gold, "gain": -0.2}, "reward": gold, "n": 3}}
    (run / "evaluation.json").write_text(json.dumps({"gold": gold, "win_rate": win, "by_kind": kinds}), encoding="utf-8")
    return run


ALLOWED = markup("# a\n\n- b\n\n| c |\n| --- |\n| d |\n\n```python\ne\n```\n\nf\ng\n")


def test_hostile_texts_stay_text(tmp_path: Path) -> None:
    card = model_card(spoiled(tmp_path / "run", HOSTILE), "merged", {**RECORD, "notes": [HOSTILE]})
    head, body = parts(card)
    assert head["base_model"] == "google/gemma-3-4b-it"
    assert markup(body) <= ALLOWED
    assert "\x1b" not in card
    assert "\u202e" not in card
    assert "alert" in body


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=500)
@given(text=TEXTS)
def test_no_text_becomes_markup(text: str) -> None:
    """As a paragraph, an item, and a cell, where the card puts one."""
    shown = as_text(text)
    assert markup(f"# a {shown}\n\n{shown}\n\n- {shown}\n- b: {shown}\n\n| c |\n| --- |\n| {shown} |\n") <= ALLOWED


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_no_text_of_a_run_becomes_markup(tmp_path: Path, text: str) -> None:
    head, body = parts(model_card(spoiled(tmp_path / "run", text), "adapter", {**RECORD, "notes": [text]}))
    assert head["base_model"] == "google/gemma-3-4b-it"
    assert markup(body) <= ALLOWED
