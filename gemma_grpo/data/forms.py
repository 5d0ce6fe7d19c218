"""The forms in which preferences are kept, told apart by their columns.

A form is decided once for a source, by its first rows, and said: every row is then read as that form or counted as dropped.
Owns the list of forms and what is said where none fits. What their columns mean is form_rows.py; turns, and what a usable
conversation is, are hh_rlhf.py; two rows to a pair are labels.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from gemma_grpo.data import form_rows as rows_of
from gemma_grpo.data.form_rows import Row


@dataclass(frozen=True, slots=True)
class Form:
    """One way of writing preferences or prompts down."""

    name: str
    columns: str
    """As a message to people names them."""
    needs: tuple[str, ...]
    """The columns without which a row is not of this form; of several spellings the commonest."""
    fits: Callable[[Row], bool]
    read: Callable[[Row], dict[Any, Any]]
    """A row as prompt, chosen and rejected (or as prompt or messages), its further columns kept. Raises UnusableRowError."""
    of_pairs: bool = True
    by_label: bool = False
    """Each row is half a pair."""


_NAME, _COLUMNS = 40, 50
"""Characters of a name, and names, that are compared with the known ones."""


def form_of(rows: Iterable[Any]) -> Form | None:
    """The form of a source by its first rows: the one most of them have, a form of pairs before one of prompts; None if none fits."""
    found = Counter(form.name for row in rows if isinstance(row, Mapping) and (form := _first_fit(row)))
    pairs = Counter({name: count for name, count in found.items() if FORMS[name].of_pairs})
    if len(pairs) > 1:
        del pairs[COMMON_BEGINNING]  # where a prompt ends is guessed only where nothing else in the data says it
    names = (pairs or found).most_common(1)
    return FORMS[names[0][0]] if names else None


def expected_columns(rows: Sequence[Any]) -> str:
    """For rows that fit no form: the nearest one and what it misses, and all forms that are known."""
    columns = list(dict.fromkeys(str(name)[:_NAME] for row in rows if isinstance(row, Mapping) for name in row))[:_COLUMNS]
    nearest = max(FORMS.values(), key=lambda form: sum(_nearness(need, columns) for need in form.needs))
    missing = [_missing(need, columns) for need in nearest.needs if need not in columns]
    told = f"Nearest is {nearest.columns}: {'; '.join(missing) or 'its columns are there, but hold something else'}. " if columns else ""
    known = "; ".join(form.columns for form in FORMS.values())
    rename = "Rename the columns to one of these; docs/data.md has an example of each."
    return f"{told}{_no_preference(set(columns))}Known forms: {known}. {rename}"


def _nearness(need: str, columns: Sequence[str]) -> float:
    return 1.0 if need in columns else 0.6 if get_close_matches(need, columns, n=1, cutoff=0.7) else -0.5


def _missing(need: str, columns: Sequence[str]) -> str:
    near = get_close_matches(need, columns, n=1, cutoff=0.7)
    return f"{need} is missing" + (f" (is it {near[0]}?)" if near else "")


def _no_preference(columns: set[str]) -> str:
    if {"transcript", "min_harmlessness_score_transcript"} <= columns:
        return "These are hh-rlhf's red-team transcripts: single conversations with a rating, without a second reply to prefer. "
    if columns & {"output", "completion", "response", "answer"}:
        return "One reply to a prompt is something to imitate; a preference needs a better and a worse one, or a label. "
    return ""


def _first_fit(row: Row) -> Form | None:
    return next((form for form in FORMS.values() if form.fits(row)), None)


COMMON_BEGINNING = "common beginning"
_ALL = (
    Form(
        "OpenAI",
        "input.messages, preferred_output, non_preferred_output",
        ("input", "preferred_output", "non_preferred_output"),
        rows_of.is_openai,
        rows_of.from_openai,
    ),
    Form(
        "ShareGPT",
        "conversations (from/value), chosen, rejected",
        ("conversations", "chosen", "rejected"),
        rows_of.is_sharegpt,
        rows_of.from_sharegpt,
    ),
    Form(
        "labels",
        "prompt, completion, label (true or false)",
        ("prompt", "completion", "label"),
        lambda row: rows_of.has(row, "prompt", "completion", "label"),
        dict,
        by_label=True,
    ),
    Form(
        "scored completions",
        "prompt or instruction, completions (response, overall_score)",
        ("instruction", "completions"),
        rows_of.is_scored,
        rows_of.from_scored,
    ),
    Form(
        "ratings",
        "prompt or instruction, generations, ratings",
        ("instruction", "generations", "ratings"),
        rows_of.is_rated,
        rows_of.from_rated,
    ),
    Form(
        "Alpaca",
        "instruction, input, chosen, rejected (or output: [better, worse])",
        ("instruction", "chosen", "rejected"),
        rows_of.is_alpaca,
        rows_of.from_alpaca,
    ),
    Form(
        "rejected response",
        "messages, rejected_response",
        ("messages", "rejected_response"),
        lambda row: rows_of.talk_column(row) == "messages" and rows_of.has(row, "rejected_response"),
        rows_of.from_rejected_response,
    ),
    Form(
        "prompt and replies",
        "prompt, chosen, rejected",
        ("prompt", "chosen", "rejected"),
        lambda row: rows_of.reply_columns(row) is not None and rows_of.has(row, "prompt"),
        rows_of.compared,
    ),
    Form(
        "conversations",
        "chosen, rejected (lists of role/content messages)",
        ("chosen", "rejected"),
        lambda row: rows_of.is_implicit(row, list),
        rows_of.compared,
    ),
    Form(
        COMMON_BEGINNING,
        "chosen, rejected (texts that begin with the prompt)",
        ("chosen", "rejected"),
        rows_of.is_plain,
        rows_of.after_common_beginning,
    ),
    Form(
        "transcripts",
        "chosen, rejected (texts of Human: and Assistant: turns, as hh-rlhf has them)",
        ("chosen", "rejected"),
        lambda row: rows_of.reply_columns(row) is not None,
        rows_of.compared,
    ),
    Form("prompts", "prompt (alone)", ("prompt",), lambda row: rows_of.has(row, "prompt"), dict, of_pairs=False),
    Form(
        "messages",
        "messages (alone; a final reply is cut off)",
        ("messages",),
        lambda row: rows_of.has(row, "messages"),
        dict,
        of_pairs=False,
    ),
    Form(
        "ShareGPT prompts",
        "conversations (from/value; alone)",
        ("conversations",),
        lambda row: rows_of.talk_column(row) is not None,
        rows_of.from_conversations,
        of_pairs=False,
    ),
)
FORMS: Mapping[str, Form] = {form.name: form for form in _ALL}
"""By name; of several that a row fits the first counts."""
PAIRS, PROMPTS = FORMS["transcripts"], FORMS["prompts"]
"""What rows of no form are read as: each is then counted as no pair, or no prompt."""
