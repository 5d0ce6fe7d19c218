"""`gemma-grpo data`: rows as conversations, how many are usable, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_grpo.cli.errors import Exit
from gemma_grpo.cli.printing import say, say_data
from gemma_grpo.escapes import printable

if TYPE_CHECKING:
    from gemma_grpo.data.prompts import PromptRow
    from gemma_grpo.types import PreferencePair

app = typer.Typer(help="Look at preference pairs or prompts before training on them.", no_args_is_help=True, rich_markup_mode=None)

Source = Annotated[str, typer.Argument(metavar="PATH", help="A .jsonl, .json, .csv, .tsv (each also .gz) or .parquet file, or a Hub id.")]


@app.command()
def preview(source: Source, rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="Rows to show.")] = 3) -> None:
    """Show the first usable rows, turn by turn. Characters that could drive a terminal are spelled out."""
    from gemma_grpo.data.hh_rlhf import LoadedPairs
    from gemma_grpo.data.inspection import preview as lines_of
    from gemma_grpo.data.prompts import load_dataset_rows

    loaded = load_dataset_rows(source)
    items: Sequence[PreferencePair | PromptRow] = loaded.pairs if isinstance(loaded, LoadedPairs) else loaded.prompts
    for number, item in enumerate(islice(items, rows), start=1):
        say(f"--- row {number}")
        for label, text in lines_of(item):
            first, *further = text.split("\n")
            say_data("\n".join([f"{label:>9}  {first}", *(f"{'':>9}  {line}" for line in further)]))
    say(f"--- {loaded.rows} rows, {loaded.kept} usable, read as {loaded.form}")


@app.command()
def stats(
    source: Source,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that would be dropped.")] = False,
) -> None:
    """Count rows, usable rows and dropped rows by reason, with the places of the first three of each; lengths in words."""
    from gemma_grpo.data.hh_rlhf import LoadedPairs
    from gemma_grpo.data.inspection import pair_stats, prompt_stats
    from gemma_grpo.data.prompts import load_dataset_rows
    from gemma_grpo.data.rejections import EXAMPLES

    loaded = load_dataset_rows(source, strict=strict)
    facts = pair_stats(loaded) if isinstance(loaded, LoadedPairs) else prompt_stats(loaded)
    if as_json:
        say_data(json.dumps(facts, indent=2))
        return
    examples = facts.pop("examples")
    for name, value in facts.items():
        say_data(f"{name:<18} {_shown(value)}")
    if examples:
        say_data(f"--- dropped, the first {EXAMPLES} of each reason")
        say_data("\n".join(map(_shown, examples)))


@app.command()
def check(
    source: Source,
    model: Annotated[str | None, typer.Option("--model", help="Also count, in this model's tokens, what the recipe's lengths cut.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="Whose lengths and data.holdout count; default: the defaults.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 2 when anything serious was found.")] = False,
    output: Annotated[Path | None, typer.Option("--output", metavar="REPORT.html", help="Write a page too.")] = None,
) -> None:
    """Look for what spoils training or should not be in it: duplicates, leaks, length bias, label slips, markers, personal data."""
    from gemma_grpo.cli.data_check import checked, report_lines, write_page

    report = checked(source, model, recipe).to_dict()
    if output is not None:
        write_page(output, source, report)
    if as_json:
        say(json.dumps(report, indent=2))
    else:
        say(*report_lines(source, report), *([f"report: {output}"] if output else []))
    if strict and report["serious"]:
        raise typer.Exit(Exit.USAGE)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{printable(str(name))} {_shown(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return f"{value:.3f}" if isinstance(value, float) else printable(str(value))
