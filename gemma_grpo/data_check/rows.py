"""Loaded pairs or prompts as what a check looks at: number, side of the split, and texts. Owns this view, not what is looked for in it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from gemma_grpo.data.hh_rlhf import LoadedPairs
from gemma_grpo.data.prompts import LoadedPrompts, PromptRow, conversation_id, is_held_out
from gemma_grpo.types import Message, PreferencePair

SCANNED = 50_000
"""Characters of one text that are looked through for patterns; hh-rlhf's longest has a tenth of that. Longer texts are counted."""


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """A usable row. Its replies are chosen and rejected; of a prompt dataset there are none."""

    number: int
    """Its line in a file of lines, else counted from 1."""
    source: str
    held_out: bool
    messages: tuple[Message, ...]
    replies: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """All turns of its conversation."""
        return "\n".join(message["content"] for message in self.messages)

    @property
    def key(self) -> Hashable:
        """Equal for equal conversations."""
        return conversation_key(self.messages)

    @property
    def texts(self) -> tuple[str, ...]:
        """Everything that it says, each text at most SCANNED characters."""
        return tuple(text[:SCANNED] for text in (*(message["content"] for message in self.messages), *self.replies))


def conversation_key(messages: Sequence[Message]) -> Hashable:
    """Equal for equal turns."""
    return tuple((message["role"], message["content"]) for message in messages)


def checked_rows(loaded: LoadedPairs | LoadedPrompts, holdout: float) -> list[CheckedRow]:
    """The usable rows with their side of the split, which is the one that a training with this holdout makes."""
    items: Sequence[PreferencePair | PromptRow] = loaded.pairs if isinstance(loaded, LoadedPairs) else loaded.prompts
    return [
        CheckedRow(
            number=number,
            source=item.source,
            held_out=is_held_out(conversation_id(item.messages), holdout),
            messages=item.messages,
            replies=(item.chosen, item.rejected) if isinstance(item, PreferencePair) else (),
        )
        for number, item in zip(loaded.numbers, items, strict=True)
    ]
