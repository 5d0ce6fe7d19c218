"""What `data stats` and `data preview` show: facts about loaded rows, and text that is safe to print."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from gemma_grpo.data.hh_rlhf import LoadedPairs
from gemma_grpo.data.prompts import LoadedPrompts, PromptRow, conversation_id
from gemma_grpo.types import Message, PreferencePair

# C0, C1 and DEL drive a terminal; format characters (Cf: bidi overrides, zero widths) make text look like other text
_ESCAPED_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # needed inside emoji and several scripts; they move nothing


def printable(text: str, *, keep_newlines: bool = True) -> str:
    """The text with every character that could drive or deceive a terminal spelled out: ESC becomes \\x1b, U+202E \\u202e."""
    return "".join(character if _is_harmless(character, keep_newlines) else _escaped(character) for character in text)


def pair_stats(loaded: LoadedPairs) -> dict[str, Any]:
    """Facts about preference pairs as JSON: counts, sources, conversations, lengths in words, how often the longer reply wins."""
    pairs = loaded.pairs
    words = [(len(pair.chosen.split()), len(pair.rejected.split())) for pair in pairs]
    return {
        **_counts(loaded, [pair.source for pair in pairs], [conversation_id(pair.messages) for pair in pairs]),
        "prompt_words": percentiles([_num_words(pair.messages) for pair in pairs]),
        "chosen_words": percentiles([chosen for chosen, _ in words]),
        "rejected_words": percentiles([rejected for _, rejected in words]),
        "longer_wins": _share(sum(chosen > rejected for chosen, rejected in words), len(words)),
        "equal_length": _share(sum(chosen == rejected for chosen, rejected in words), len(words)),
        "identical_replies": sum(pair.chosen == pair.rejected for pair in pairs),
    }


def prompt_stats(loaded: LoadedPrompts) -> dict[str, Any]:
    """Facts about a prompt dataset as JSON: counts, sources, conversations, lengths in words, further columns."""
    prompts = loaded.prompts
    return {
        **_counts(loaded, [prompt.source for prompt in prompts], [conversation_id(prompt.messages) for prompt in prompts]),
        "prompt_words": percentiles([_num_words(prompt.messages) for prompt in prompts]),
        "columns": sorted({column for prompt in prompts for column in prompt.columns}),
    }


def preview(item: PreferencePair | PromptRow) -> list[tuple[str, str]]:
    """(label, text) lines of one row for the terminal, every text printable: its turns, then both replies of a pair."""
    lines = [("source", printable(item.source, keep_newlines=False))]
    lines += [(message["role"], printable(message["content"])) for message in item.messages]
    if isinstance(item, PreferencePair):
        lines += [("chosen", printable(item.chosen)), ("rejected", printable(item.rejected))]
    return lines + [(printable(name, keep_newlines=False), printable(str(value))) for name, value in item.columns.items()]


def percentiles(values: Sequence[int]) -> dict[str, int]:
    """Nearest-rank percentiles: the smallest value that at least so many per cent do not exceed. Zeros when there are none."""
    ranked = sorted(values) or [0]
    return {f"p{p}": ranked[max(0, -(-p * len(ranked) // 100) - 1)] for p in (50, 90, 95, 99)} | {"max": ranked[-1]}


def _counts(loaded: LoadedPairs | LoadedPrompts, sources: Sequence[str], conversations: Sequence[str]) -> dict[str, Any]:
    return {
        "rows": loaded.rows,
        "kept": loaded.kept,
        "dropped": dict(loaded.dropped),
        "examples": list(loaded.examples),
        "sources": dict(Counter(sources).most_common()),
        "conversations": len(set(conversations)),
    }


def _num_words(messages: Sequence[Message]) -> int:
    return sum(len(message["content"].split()) for message in messages)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _is_harmless(character: str, keep_newlines: bool) -> bool:
    if character in _JOINERS or (keep_newlines and character in "\n\t"):
        return True
    return unicodedata.category(character) not in _ESCAPED_CATEGORIES


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
