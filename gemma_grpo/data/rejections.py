"""Rows that were not used: how many for each reason, and where the first of each stand. Owns the reasons' words, not who gives them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from gemma_grpo.data.sources import DataError, Rows

EXAMPLES = 3
"""Places kept for each reason: enough to look at, however many rows are dropped."""

REASONS: Mapping[str, str] = MappingProxyType(
    {
        "not_a_pair": "it has no chosen and rejected conversations",
        "not_a_prompt": "it has no prompt or messages",
        "not_text": "it holds half of a surrogate pair, which is no text",
        "empty_final_reply": "chosen or rejected ends without a reply",
        "prompts_differ": "chosen and rejected differ before their last turn",
        "roles_do_not_alternate": "user and assistant do not take turns, the user first",
        "last_turn_not_assistant": "its last turn is not the assistant's",
        "last_turn_not_user": "its last turn is not the user's",
        "empty_prompt": "the last turn of its prompt is empty",
        "tie": "its replies have the same score",
        "scores_contradict": "rejected has a higher score than chosen",
        "too_few_scores": "fewer than two of its replies have a text and a score",
        "not_a_label": "its label is neither true nor false",
        "no_counterpart": "no other row has its prompt and the other label",
        "no_common_prompt": "chosen and rejected do not begin with the same words, and there is no prompt",
        "unknown_turns": "it is one text with turn markers that are not hh-rlhf's",
    }
)


class UnusableRowError(Exception):
    """Why a row is dropped, a key of REASONS; never leaves this package."""


class Rejections:
    """Counts of one source's dropped rows. With `strict` the first one is a DataError."""

    def __init__(self, rows: Rows, *, strict: bool, always: Iterable[str] = ()) -> None:
        self.counts = Counter(dict.fromkeys(always, 0))
        self.examples: list[str] = []
        """ "path:line: reason" of the first rows of each reason, in the order of the rows."""
        self._rows, self._strict = rows, strict

    def add(self, number: int, why: UnusableRowError) -> None:
        """Count a row by its number. Raises DataError naming its place if none may be dropped."""
        reason = str(why)
        place = f"{self._rows.where(number)}: {reason}"
        if self._strict:
            raise DataError(f"{place} ({REASONS[reason]}). Mend this row or take it out; without strict it is dropped and counted.")
        self.counts[reason] += 1
        if self.counts[reason] <= EXAMPLES:
            self.examples.append(place)
