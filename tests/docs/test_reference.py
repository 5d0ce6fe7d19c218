"""docs/configuration.md and docs/cli.md are what their script writes, and leave nothing out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from markdown_blocks import ROOT
from pydantic import BaseModel

from gemma_grpo.config import GRPOConfig
from scripts import write_reference


@pytest.mark.parametrize("name", write_reference.PAGES)
def test_the_page_is_what_the_script_writes(name: str) -> None:
    committed = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert committed == write_reference.PAGES[name](), "run python scripts/write_reference.py"


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{name}.")
        else:
            yield prefix + name


def test_every_setting_has_a_row_with_kind_default_and_sentence() -> None:
    rows = {line.split("|")[1].strip(): line for line in write_reference.configuration_page().splitlines() if line.startswith("| `")}
    settings = list(leaves(GRPOConfig))
    assert len(settings) > 100
    assert [f"`{name}`" for name in settings] == list(rows)
    for row in rows.values():
        _, _, kind, default, what, _ = row.replace("\\|", "").split("|")
        assert kind.strip(), row
        assert default.strip(), row
        assert len(what.split()) >= 3, row


def test_every_verb_and_every_option_is_there() -> None:
    page = write_reference.cli_page()
    verbs = write_reference.verbs()
    assert {"doctor", "demo", "plan", "train", "evaluate", "watch", "chat", "data preview", "recipes copy"} <= {name for name, _ in verbs}
    for name, command in verbs:
        section = page.partition(f"## gemma-grpo {name}\n")[2].partition("\n## ")[0]
        assert command.help, name
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert f"`{parameter.opts[0]}" in section, (name, parameter.opts)
                assert parameter.help, (name, parameter.opts)


NAMED = ("num_generations", "max_steps", "learning_rate", "precision", "gradient_checkpointing")


def test_kinds_are_said_as_a_reader_would() -> None:
    kinds = {
        name: write_reference.kind(field.annotation, field.metadata) for name, field in GRPOConfig.model_fields.items() if name in NAMED
    }
    assert kinds["num_generations"] == "whole number at least 2"
    assert kinds["max_steps"] == "whole number at least 1 or null"
    assert kinds["learning_rate"] == "number above 0"
    assert kinds["precision"] == "`auto`, `fp32`, `bf16`, `fp16_rescaled`"
    assert kinds["gradient_checkpointing"] == "true or false"
