"""A conversation with one side or with both: what each of them has read and said, and what a file keeps of it. Loads no model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_grpo.containment import link_out
from gemma_grpo.types import Message, Side

if TYPE_CHECKING:
    from gemma_grpo.grpo.opinion import Opinion
    from gemma_grpo.grpo.playing import Reply

BOTH: tuple[Side, ...] = ("base", "tuned")
CHATS = "chats"


@dataclass
class Exchange:
    """A question in its conversation, and an answer."""

    checkpoint: str
    messages: list[Message]
    reply: Reply
    temperature: float
    opinion: Opinion | None = None
    """None until it is asked for."""


class Conversation:
    """Who answers, and each side's own history: both were asked the same, and each goes on from what it said itself."""

    def __init__(self) -> None:
        self.sides: tuple[Side, ...] = ("tuned",)
        self._histories: dict[Side, list[Message]] = {side: [] for side in BOTH}

    def ask(self, question: str) -> None:
        """One more question to whoever answers."""
        for side in self.sides:
            self._histories[side].append({"role": "user", "content": question})

    def begin(self, messages: Sequence[Message] = ()) -> None:
        """Forget what was said; `messages` are what is asked first."""
        self._histories = {side: list(messages) for side in BOTH}

    def messages(self, side: Side) -> list[Message]:
        """What a side has to answer, or has answered last; empty before the first question."""
        history = self._histories[side]
        return list(history[:-1] if history and history[-1]["role"] == "assistant" else history)

    def answered(self, side: Side, text: str) -> None:
        """Keep an answer, in place of an earlier one to the same question."""
        self._histories[side] = [*self.messages(side), {"role": "assistant", "content": text}]

    def withdraw(self) -> None:
        """Take back the last question, which could not be asked."""
        for side in self.sides:
            self._histories[side] = self.messages(side)[:-1]

    def switch(self, sides: tuple[Side, ...]) -> bool:
        """Let these sides answer from here on; whether they have the last question to answer first.

        A side that did not answer so far takes over the conversation of the one that did; for both, the tuned side's goes on.
        """
        before, self.sides = self.sides, sides
        if len(sides) == 1 and sides[0] in before:
            return False
        goes_on = self.messages(before[-1])
        for side in sides:
            self._histories[side] = list(goes_on)
        return bool(goes_on)


def free_file(run_dir: Path) -> Path:
    """Where the next chat of a run is kept. Raises ValueError where a link leads out of the run directory."""
    link = link_out(run_dir)
    if link:
        raise ValueError(link)
    folder = run_dir / CHATS
    numbers = [int(path.stem[5:]) for path in folder.glob("chat-*.jsonl") if path.stem[5:].isdigit()]
    return folder / f"chat-{max(numbers, default=0) + 1}.jsonl"


def check_new(path: Path) -> Path:
    """The path, which must not be there yet: what somebody has written is not written over."""
    if os.path.lexists(path):
        raise ValueError(f"{path} is there already, and is not written over. Name another file: /save FILE.")
    return path


def records(run: Mapping[str, Any], exchanges: Sequence[Exchange]) -> list[dict[str, Any]]:
    """A chat as the lines of its file: what it was with, then every answer in its order."""
    return [{"kind": "chat", **run}, *(_record(one) for one in exchanges)]


def _record(one: Exchange) -> dict[str, Any]:
    reply, opinion = one.reply, one.opinion
    found = {
        "kind": "answer",
        "checkpoint": one.checkpoint,
        "side": reply.side,
        "seed": reply.seed,
        "temperature": one.temperature,
        "messages": [dict(message) for message in one.messages],
        "left_out": reply.left_out,
        "reply": reply.text,
        "finish": reply.finish,
        "length": reply.length,
        "pieces": list(reply.pieces),
        "log_ratios": list(reply.log_ratios),
    }
    if opinion is not None:
        parts = {part.name: {"weight": part.weight, "raw": part.raw, "counted": part.counted, "why": part.why} for part in opinion.parts}
        found["reward"] = {"total": opinion.total, "complete": opinion.complete, "parts": parts, "notes": list(opinion.notes)}
    return found
