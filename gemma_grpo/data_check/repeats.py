"""Rows that are there more than once, on both sides of the split, or with labels that contradict each other. Owns these findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from gemma_grpo.data_check.findings import Finding, examples_of, level_of
from gemma_grpo.data_check.near import near_twins, normalised
from gemma_grpo.data_check.rows import SCANNED, CheckedRow, conversation_key

MAX_ROWS = 200_000
"""Rows among which near ones are looked for; equal ones are found in any number."""
MIN_WORDS = 8
"""Words of a prompt from which near is told: of shorter ones most are near to some other by chance."""
STOCK_WORDS = 5
"""Words of a reply from which it counts as chosen here and rejected there: "Yes." is both everywhere."""


def repeat_findings(rows: Sequence[CheckedRow]) -> list[Finding]:
    """Duplicates, leaks over the split, and for pairs contradicting labels."""
    told = [tuple(normalised(text[:SCANNED]) for text in (row.prompt, *row.replies)) for row in rows]
    found = [*_duplicates(rows, told), _repeated_prompts(rows), _split_leaks(rows, [texts[0] for texts in told])]
    return [*found, *_contradictions(rows)] if any(row.replies for row in rows) else found


def _duplicates(rows: Sequence[CheckedRow], told: Sequence[tuple[str, ...]]) -> list[Finding]:
    exact = _repeated((row.key, row.replies) for row in rows)
    alike = [again and not same for again, same in zip(_repeated(told), exact, strict=True)]
    whole = [" ".join(texts) for texts in told[:MAX_ROWS]]
    twins = near_twins(whole)
    near = [twin >= 0 and not exact[n] and not alike[n] for n, twin in enumerate(twins)]
    names = ("exact_duplicates", "normalised_duplicates", "near_duplicates")
    of = (len(rows), len(rows), len(whole))
    return [_marked(name, rows, marks, of=number) for name, marks, number in zip(names, (exact, alike, near), of, strict=True)]


def _repeated_prompts(rows: Sequence[CheckedRow]) -> Finding:
    return _marked("repeated_prompts", rows, _repeated(row.key for row in rows), level="fine")


def _split_leaks(rows: Sequence[CheckedRow], prompts: Sequence[str]) -> Finding:
    """Held-out rows whose prompt, or its first turn, is one of training but for punctuation, or is near to one."""
    rows, prompts = rows[:MAX_ROWS], prompts[:MAX_ROWS]
    training = [not row.held_out for row in rows]
    firsts = [normalised(_first_turn(row)[:SCANNED]) for row in rows]
    known = {first for first, trained in zip(firsts, training, strict=True) if trained}
    twins = near_twins(prompts, of=training)
    marks = [
        row.held_out and (firsts[n] in known or (twins[n] >= 0 and prompts[n].count(" ") >= MIN_WORDS - 1)) for n, row in enumerate(rows)
    ]
    held_out = sum(row.held_out for row in rows)
    return _marked("split_leaks", rows, marks, of=held_out, what="held-out rows", serious_from=0.01)


def _contradictions(rows: Sequence[CheckedRow]) -> list[Finding]:
    """Of pairs; nothing else has a label."""
    pairs = {(row.key, *row.replies) for row in rows}
    same = [row.replies[0] == row.replies[1] for row in rows]
    opposite = [not same[n] and (row.key, row.replies[1], row.replies[0]) in pairs for n, row in enumerate(rows)]
    return [
        _marked("opposite_labels", rows, opposite, serious_from=0.01),
        _marked("identical_replies", rows, same),
        _chosen_and_rejected(rows),
        _continued(rows),
    ]


def _chosen_and_rejected(rows: Sequence[CheckedRow]) -> Finding:
    chosen = {row.replies[0] for row in rows}
    to_prompt = {(row.key, row.replies[0]) for row in rows}
    marks = [row.replies[1] in chosen and row.replies[1] != row.replies[0] and _is_long(row.replies[1]) for row in rows]
    here = sum(mark and (row.key, row.replies[1]) in to_prompt for mark, row in zip(marks, rows, strict=True))
    details = {"to the same prompt": here, "to another prompt": sum(marks) - here}
    return _marked("chosen_and_rejected", rows, marks, details=details, serious_from=0.2, side=1)


def _continued(rows: Sequence[CheckedRow]) -> Finding:
    """Rows whose conversation goes through a reply of another row, and which of the two it was."""
    sides: dict[Hashable, list[tuple[str, bool]]] = {}
    for row in rows:
        for side, reply in zip(("chosen", "rejected"), row.replies, strict=True):
            sides.setdefault((row.key, reply), []).append((side, row.held_out))
    marks, seen, across = [], Counter[str](), 0
    for row in rows:
        found = [
            one
            for end, message in enumerate(row.messages)
            if message["role"] == "assistant"
            for one in sides.get((conversation_key(row.messages[:end]), message["content"]), ())
        ]
        marks.append(bool(found))
        seen.update({side for side, _ in found})
        across += any(held_out != row.held_out for _, held_out in found)
    details = {"goes on with the chosen": seen["chosen"], "goes on with the rejected": seen["rejected"], "across the split": across}
    return _marked("continued_replies", rows, marks, details=details, level="serious" if across else None, serious_from=2)


def _marked(
    name: str,
    rows: Sequence[CheckedRow],
    marks: Sequence[bool],
    *,
    of: int | None = None,
    what: str = "rows",
    details: dict[str, Any] | None = None,
    level: Any = None,
    serious_from: float = 0.05,
    side: int | None = None,
) -> Finding:
    """The finding of these rows; the examples show the last question, or one of the replies."""
    count, whole = sum(marks), len(rows) if of is None else of
    found = (
        (row, row.messages[-1]["content"] if side is None else row.replies[side]) for row, mark in zip(rows, marks, strict=False) if mark
    )
    return Finding(name, level or level_of(count, whole, serious_from), count, whole, what, examples_of(found), details or {})


def _repeated(keys: Iterable[Hashable]) -> list[bool]:
    """For each key whether it was there before."""
    counts: Counter[Hashable] = Counter()
    again = []
    for key in keys:
        again.append(counts[key] > 0)
        counts[key] += 1
    return again


def _first_turn(row: CheckedRow) -> str:
    return next((message["content"] for message in row.messages if message["role"] == "user"), "")


def _is_long(reply: str) -> bool:
    return len(reply.split(maxsplit=STOCK_WORDS)) >= STOCK_WORDS
