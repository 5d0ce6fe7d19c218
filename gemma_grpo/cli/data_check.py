"""What `gemma-grpo data check` prints: the findings in 80 columns, or JSON; and the file it writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from gemma_grpo.config import GRPOConfig, load_recipe
from gemma_grpo.disk import write_whole
from gemma_grpo.escapes import printable

if TYPE_CHECKING:
    from gemma_grpo.data_check.check import DataReport

WIDTH = 80
_INDENT = " " * 9


def checked(source: str, model: str | None, recipe: str | None) -> DataReport:
    """The check of a source; with a model also against the recipe's lengths. Raises DataError, ConfigError, AccessError."""
    from gemma_grpo.data.prompts import load_dataset_rows
    from gemma_grpo.data_check.check import check_data

    name = recipe or ("miniature" if model == "miniature" else None)
    config = load_recipe(name) if name else GRPOConfig()
    tokenizer = None
    if model is not None:
        from gemma_grpo.model.gemma import load_tokenizer

        tokenizer = load_tokenizer(model)
    return check_data(load_dataset_rows(source), config, tokenizer)


def write_page(path: Path, source: str, report: Mapping[str, Any]) -> None:
    """Write the HTML report. Raises ValueError for a name that could be the data's own, OSError where it cannot be written."""
    from gemma_grpo.monitor.data_report import render_data_report

    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"--output {path}: the report is a page. Give it a name that ends in .html.")
    write_whole(path, render_data_report(Path(source).name, report).encode())


def report_lines(source: str, report: Mapping[str, Any]) -> list[str]:
    """The findings for a terminal: those to act on whole, the others one line each."""
    shown = [one for one in report["findings"] if one["level"] != "fine"]
    fine = [one for one in report["findings"] if one["level"] == "fine"]
    lines = [*_facts(source, report), ""]
    for one in shown:
        lines += [*_finding(one), ""]
    lines += [line for one in fine for line in _wrapped(f"{'fine':<9}{_headline(one)}")]
    counts = [sum(one["level"] == level for one in report["findings"]) for level in ("serious", "look")]
    return [*lines, "", f"{counts[0]} serious, {counts[1]} to look at, {len(fine)} fine"]


def _facts(source: str, report: Mapping[str, Any]) -> Iterator[str]:
    merged = f", {_whole(report['merged'])} of them second halves of a pair" if report.get("merged") else ""
    yield from _wrapped(f"{printable(source)}: {_whole(report['rows'])} rows read as {report['form']}{merged}")
    conversations, held_out = _whole(report["conversations"]), _whole(report["rows_held_out"])
    yield f"{_whole(report['kept'])} usable, {conversations} conversations, {held_out} rows held out"
    yield from _wrapped("sources: " + ", ".join(f"{name} {_whole(count)}" for name, count in report["sources"].items()))
    cut = report["rows_with_a_text_not_read_to_its_end"]
    if cut:
        yield from _wrapped(f"{_whole(cut)} rows have a text so long that only its beginning was looked through")


def _finding(one: Mapping[str, Any]) -> Iterator[str]:
    yield from _wrapped(f"{one['level'].upper():<9}{_headline(one)}")
    yield from _wrapped(_INDENT + one["meaning"])
    if one["details"]:
        yield from _wrapped(_INDENT + "; ".join(f"{name} {_detail(value)}" for name, value in one["details"].items()))
    yield from _wrapped(f"{_INDENT}-> {one['remedy']}")
    for example in one["examples"]:
        yield from _wrapped(f"{_INDENT}row {example['row']}: {example['text']}")


def _headline(one: Mapping[str, Any]) -> str:
    share = f" ({one['share']:.1%})" if one["count"] else ""
    return f"{_whole(one['count'])} of {_whole(one['of'])} {one['what']}{share}: {one['title']}"


def _detail(value: Any) -> str:
    if not isinstance(value, Mapping):
        return _whole(value)
    low, high = value["interval"]
    return "-" if value["value"] is None else f"{value['value']:.1%} [{low:.1%} to {high:.1%}] of {_whole(value['n'])}"


def _whole(value: int) -> str:
    return f"{value:,}"


def _wrapped(text: str) -> list[str]:
    return wrap(text, WIDTH, subsequent_indent=_INDENT, break_on_hyphens=False) or [""]
