"""What `data stats` and `data preview` show: facts about loaded rows, and their texts safe to print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from gemma_grpo.data.hh_rlhf import LoadedPairs
from gemma_grpo.data.prompts import LoadedPrompts, PromptRow, conversation_id
from gemma_grpo.escapes import printable, visible
from gemma_grpo.types import Message, PreferencePair


def pair_stats(loaded: LoadedPairs) -> dict[str, Any]:
    """Facts about preference pairs as JSON: counts, sources, conversations, lengths in words, how often the longer reply wins."""
    pairs = loaded.pairs
    words = [(len(pair.chosen.split()), len(pair.rejected.split())) for pair in pairs]
    return {
        **_counts(loaded, [pair.source for pair in pairs], [conversation_id(pair.messages) for pair in pairs]),
        "merged": loaded.merged,
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
    """(label, text) lines of one row for the terminal, every text harmless there: its turns, then both replies of a pair."""
    lines = [("source", printable(item.source))]
    lines += [(message["role"], visible(message["content"])) for message in item.messages]
    if isinstance(item, PreferencePair):
        lines += [("chosen", visible(item.chosen)), ("rejected", visible(item.rejected))]
    return lines + [(printable(name), visible(str(value))) for name, value in item.columns.items()]


def percentiles(values: Sequence[int]) -> dict[str, int]:
    """Nearest-rank percentiles: the smallest value that at least so many per cent do not exceed. Zeros when there are none."""
    ranked = sorted(values) or [0]
    return {f"p{p}": ranked[max(0, -(-p * len(ranked) // 100) - 1)] for p in (50, 90, 95, 99)} | {"max": ranked[-1]}


def _counts(loaded: LoadedPairs | LoadedPrompts, sources: Sequence[str], conversations: Sequence[str]) -> dict[str, Any]:
    return {
        "form": loaded.form,
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
