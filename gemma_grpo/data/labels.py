"""Single replies with a label -> pairs: a good and a bad reply to the same prompt, each reply in one pair at most.

Owns who is paired with whom. Rows come one after the other, and only those that still wait for a partner are held.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from typing import Any

from gemma_grpo.data.rejections import UnusableRowError

_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


class Pairing:
    """The n-th good reply to a prompt with the n-th bad one, in the order of the rows."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[bool, deque[tuple[int, Mapping[Any, Any]]]]] = {}
        self.merged = 0
        """Rows that went into a pair together with another one."""

    def add(self, number: int, row: Mapping[Any, Any]) -> dict[Any, Any] | None:
        """A pair as prompt, chosen and rejected, with this row's further columns; None while the row waits. Raises UnusableRowError."""
        if any(row.get(name) is None for name in ("prompt", "completion", "label")):
            raise UnusableRowError("not_a_pair")
        label = _LABELS.get(str(row["label"]).strip().casefold())
        if label is None:
            raise UnusableRowError("not_a_label")
        key = _key(row["prompt"])
        waiting_label, waiting = self._waiting.setdefault(key, (label, deque()))
        if label == waiting_label:
            waiting.append((number, row))
            return None
        _, other = waiting.popleft()
        if not waiting:
            del self._waiting[key]
        self.merged += 1
        good, bad = (row, other) if label else (other, row)
        rest = {name: value for name, value in row.items() if name not in ("completion", "label")}
        return rest | {"chosen": good["completion"], "rejected": bad["completion"]}

    def left(self) -> list[int]:
        """Numbers of the rows that no partner came for, in order."""
        return sorted(number for _, waiting in self._waiting.values() for number, _ in waiting)


def _key(prompt: Any) -> str:
    """Equal for equal prompts, whatever they are."""
    if isinstance(prompt, str):
        return prompt.strip()
    try:
        return json.dumps(prompt, sort_keys=True, default=str)
    except TypeError:  # names of several types cannot be sorted
        return repr(prompt)
