"""Preference rows -> PreferencePair: hh-rlhf's transcripts, role/content messages, every dropped row counted with its reason.

Kept as it stands: a role label without the blank line before it, control tokens as text, NUL, bidirectional marks, further columns of any
kind, two equal replies (the prompt is good, and the pair teaches the reward nothing; `data stats` counts them).
Put right: whitespace around a turn is stripped, a transcript's lost first blank line is given back, CRLF ends its lines as LF does.
Dropped, under the first reason that applies: a row or side that is no conversation, text that is none, an empty reply, prompts that
differ, roles that do not alternate, a last turn that is not the assistant's, an empty last user turn.
Owns this recipe. Other columns become these in forms.py. Reading files, and what stops it, is sources.py, json_files.py and
tables.py; tokens are chat.py and prompts.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_grpo.data.forms import PAIRS, Form, expected_columns, form_of
from gemma_grpo.data.labels import Pairing
from gemma_grpo.data.rejections import Rejections, UnusableRowError
from gemma_grpo.data.sources import DataError, Rows, RowSource, describe_columns, open_rows
from gemma_grpo.types import Message, PreferencePair, Role

__all__ = ["DataError", "LoadedPairs", "load_hh_rlhf", "message_turns", "parse_pairs", "transcript_turns"]

NAMED_REASONS = ("empty_final_reply", "prompts_differ", "roles_do_not_alternate")
"""Reasons real hh-rlhf rows are dropped for; a row is counted under the first that applies, in this order."""

FIRST = 100
"""Rows that are looked at to tell a source's form."""

_MARKER = re.compile(r"\r?\n\r?\n(Human|Assistant):")
_SPEAKER: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_CONSUMED = ("chosen", "rejected", "prompt")


@dataclass(frozen=True, slots=True)
class LoadedPairs:
    """Usable pairs of one source: rows = kept + merged + sum of dropped."""

    pairs: tuple[PreferencePair, ...]
    rows: int
    dropped: Mapping[str, int]
    """Reason -> rows. The reasons of hh-rlhf itself are always there, further ones only when they occurred:
    not_a_pair (no chosen and rejected conversations), not_text (unpaired surrogates), last_turn_not_assistant, empty_prompt, and
    those that only some forms can have (rejections.py)."""
    examples: tuple[str, ...] = ()
    """Where the first three rows of each reason stand: "path:line: reason"."""
    form: str = ""
    """What the rows were read as, a name of forms.FORMS; empty for rows that came as PreferencePair."""
    merged: int = 0
    """Rows that share a pair with another one: replies that came singly, with a label."""
    numbers: tuple[int, ...] = ()
    """Each pair's row: its line in a file of lines, else counted from 1. Of two rows the later one."""

    @property
    def kept(self) -> int:
        """Number of usable pairs."""
        return len(self.pairs)


def load_hh_rlhf(source: RowSource, *, name: str | None = None, strict: bool = False) -> LoadedPairs:
    """Preference pairs of a file (.jsonl, .json, .csv, .tsv, each also .gz, or .parquet), a Hub id, a list of rows or a datasets.Dataset.

    A row holds "chosen" and "rejected": transcripts ("\\n\\nHuman: ...\\n\\nAssistant: ...") or lists of role/content messages, whole
    conversations or continuations of a further "prompt"; or it has another of the forms in docs/data.md. `name` becomes each pair's
    source; without it the row's own "source" column does, or else the file's or dataset's name. Raises DataError, also when no row is
    usable, and with `strict` for the first that is not.
    """
    first, opened = open_rows(source).peek(FIRST)
    loaded = parse_pairs(opened, name=name, strict=strict)
    if not loaded.pairs:
        form = form_of(first)
        of_pairs = form if form and form.of_pairs else None
        raise DataError(no_usable_row(opened.place, first, loaded.rows, loaded.dropped, form=of_pairs))
    return loaded


def parse_pairs(rows: Rows | Iterable[Any], *, name: str | None = None, strict: bool = False) -> LoadedPairs:
    """Pairs of opened or given rows; whatever a row holds, it becomes a pair or is counted under a reason (with `strict`: DataError).

    The first 100 rows decide which form all of them are read as.
    """
    first, opened = (rows if isinstance(rows, Rows) else open_rows(rows)).peek(FIRST)
    found = form_of(first)
    form = found if found and found.of_pairs else PAIRS
    pairs: list[PreferencePair] = []
    numbers: list[int] = []
    pairing = Pairing()
    rejections = Rejections(opened, strict=strict, always=NAMED_REASONS)
    for number, row in opened.numbered:
        try:
            pair = row if isinstance(row, PreferencePair) else _read_pair(row, number, form, pairing, (opened.name, name))
        except UnusableRowError as why:
            rejections.add(number, why)
            continue
        if pair is not None:
            pairs.append(pair)
            numbers.append(number)
    for number in pairing.left():
        rejections.add(number, UnusableRowError("no_counterpart"))
    counts, merged = rejections.counts, pairing.merged
    told = form.name if found or not all(isinstance(row, PreferencePair) for row in first) else ""
    rows_read = len(pairs) + merged + counts.total()
    return LoadedPairs(tuple(pairs), rows_read, dict(counts), tuple(rejections.examples), told, merged, tuple(numbers))


def no_usable_row(place: str, first: Sequence[Any], rows: int, dropped: Mapping[str, int], *, form: Form | None) -> str:
    """The message for loaded data of which nothing is left; `form` is what the rows were recognised as, if they were."""
    if not rows:
        return f"{place} holds no rows. Download it again, or give another file."
    counts = ", ".join(f"{reason} {number}" for reason, number in dropped.items() if number)
    what = f"{place}: none of {rows} rows is usable ({counts}); {describe_columns(first)}"
    if form is None:
        return f"{what}. {expected_columns(first)}"
    return f"{what}, read as {form.name}: {form.columns}. Look at a row that is none of these: docs/data.md has an example of each form."


def transcript_turns(text: str) -> list[Message] | None:
    """Turns of a transcript, split on the exact markers "\\n\\nHuman:" and "\\n\\nAssistant:" and stripped; None if it is not one.

    A label inside a turn, without the blank line before it, is text of that turn. A transcript whose first blank line was
    stripped away, or whose lines end in CRLF, is read all the same.
    """
    if text.lstrip().startswith(("Human:", "Assistant:")):
        text = "\n\n" + text.lstrip()
    head, *parts = _MARKER.split(text)
    if head.strip() or not parts:
        return None
    return [{"role": _SPEAKER[speaker], "content": content.strip()} for speaker, content in zip(parts[::2], parts[1::2], strict=True)]


def message_turns(value: Any) -> list[Message] | None:
    """A list of role/content messages, contents stripped; None if it is anything else, such as turns with images."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        return None
    turns: list[Message] = []
    for item in value:
        if not isinstance(item, Mapping):
            return None
        role, content = item.get("role"), _text_of(item.get("content"))
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            return None
        turns.append({"role": role, "content": content.strip()})
    return turns


def _text_of(content: Any) -> Any:
    """The text of a content that comes in parts, all of them text (Anthropic's and OpenAI's messages); other contents as they are."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    parts = [text for text in texts if isinstance(text, str)]
    return "\n\n".join(parts) if len(parts) == len(content) else content


def check_text(turns: Iterable[Message]) -> None:
    """Raise UnusableRowError for half surrogate pairs: JSON can spell them, but they are no text and no tokenizer takes them."""
    for turn in turns:
        try:
            turn["content"].encode("utf-8")
        except UnicodeEncodeError:
            raise UnusableRowError("not_text") from None


def alternates(turns: Sequence[Message]) -> bool:
    """Whether roles run user, assistant, user, ..., after an optional system message."""
    spoken = turns[1:] if turns and turns[0]["role"] == "system" else turns
    return all(turn["role"] == ("user", "assistant")[index % 2] for index, turn in enumerate(spoken))


def content_hash(content: Any) -> str:
    """16 hex digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=True, sort_keys=True).encode()).hexdigest()[:16]


def row_columns(row: Mapping[Any, Any], consumed: Sequence[str]) -> dict[str, Any]:
    """The row's further columns, without those already read and without its source."""
    read = (*consumed, "source") if isinstance(row.get("source"), str) else consumed
    return {str(key): value for key, value in row.items() if key not in read}


def row_source(row: Mapping[Any, Any], fallback_name: str, name: str | None) -> str:
    """The name argument, else the row's own source, else the name of file or dataset."""
    own = row.get("source")
    return name or (own if isinstance(own, str) and own else fallback_name)


def _read_pair(row: Any, number: int, form: Form, pairing: Pairing, names: tuple[str, str | None]) -> PreferencePair | None:
    """The pair of a row; None while it waits for the row with the other label."""
    if not isinstance(row, Mapping):
        raise UnusableRowError("not_a_pair")
    read: Mapping[Any, Any] | None = form.read(row)
    if form.by_label:
        read = pairing.add(number, row)
    return None if read is None else _parse_pair(read, *names)


def _parse_pair(row: Mapping[Any, Any], fallback_name: str, name: str | None) -> PreferencePair:
    chosen, rejected = (_side(row.get("prompt"), row.get(side)) for side in ("chosen", "rejected"))
    check_text([*chosen, *rejected])
    if not chosen[-1]["content"] or not rejected[-1]["content"]:
        raise UnusableRowError("empty_final_reply")
    if chosen[:-1] != rejected[:-1]:
        raise UnusableRowError("prompts_differ")
    if not alternates(chosen) or not alternates(rejected):
        raise UnusableRowError("roles_do_not_alternate")
    if chosen[-1]["role"] != "assistant":
        raise UnusableRowError("last_turn_not_assistant")
    if not chosen[-2]["content"]:
        raise UnusableRowError("empty_prompt")
    replies = chosen[-1]["content"], rejected[-1]["content"]
    return PreferencePair(
        pair_id=content_hash([chosen[:-1], *replies]),
        source=row_source(row, fallback_name, name),
        messages=tuple(chosen[:-1]),
        chosen=replies[0],
        rejected=replies[1],
        columns=row_columns(row, _CONSUMED),
    )


def _side(prompt: Any, reply: Any) -> list[Message]:
    """One side as a whole conversation: it is one itself, or it continues the prompt."""
    if prompt is None:
        return _required(transcript_turns(reply) if isinstance(reply, str) else message_turns(reply))
    if isinstance(reply, str):
        marker = _MARKER.match(reply)
        if marker and marker[1] == "Human":
            return _required(transcript_turns(reply))
        return [*_prompt_turns(prompt), {"role": "assistant", "content": reply.strip()}]
    turns = _required(message_turns(reply))
    return turns if turns[0]["role"] != "assistant" else [*_prompt_turns(prompt), *turns]


def _prompt_turns(prompt: Any) -> list[Message]:
    turns = _required(prompt_turns(prompt))
    # an open "\n\nAssistant:" at the end is where the replies go on, not a turn
    if isinstance(prompt, str) and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns


def prompt_turns(prompt: Any) -> list[Message] | None:
    """Turns of a `prompt` column: a transcript, one user turn of plain text, or role/content messages; None if it is neither."""
    if isinstance(prompt, str):
        return transcript_turns(prompt) or [{"role": "user", "content": prompt.strip()}]
    return message_turns(prompt)


def _required(turns: list[Message] | None) -> list[Message]:
    if not turns:
        raise UnusableRowError("not_a_pair")
    return turns
