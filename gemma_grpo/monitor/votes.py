"""Blind votes of people between a run's base and its tuned model: votes.jsonl, and what they come to.

A vote is a person's choice between two replies to one prompt that did not say whose they were. Written by the page, read by the report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_grpo.disk import append_all
from gemma_grpo.monitor.run_files import Record
from gemma_grpo.run_layout import VOTES
from gemma_grpo.shares import wilson_interval

_WORTH = {"tuned": 1.0, "tie": 0.5, "base": 0.0}


@dataclass(frozen=True, slots=True)
class Tally:
    """How often the tuned model was preferred; ties count half."""

    tuned: int
    base: int
    ties: int
    prompts: int
    rate: float
    """Mean over prompts of the mean of their votes."""
    low: float
    high: float

    @property
    def count(self) -> int:
        """All votes."""
        return self.tuned + self.base + self.ties


def append_vote(run: Path, vote: Mapping[str, Any]) -> None:
    """Add a vote: "choice" is tuned, base or tie, "messages" the prompt. Raises OSError."""
    append_all(run / VOTES, (json.dumps(dict(vote), ensure_ascii=True, allow_nan=False) + "\n").encode())


def tally(votes: Sequence[Record]) -> Tally | None:
    """None without votes. The interval is Wilson's, with prompts for its n: votes on one prompt tell much the same."""
    by_prompt: dict[str, list[float]] = {}
    choices = []
    for vote in votes:
        choice = vote.get("choice")
        if isinstance(choice, str) and choice in _WORTH:
            choices.append(choice)
            by_prompt.setdefault(json.dumps(vote.get("messages"), sort_keys=True), []).append(_WORTH[choice])
    if not choices:
        return None
    rate = sum(sum(worths) / len(worths) for worths in by_prompt.values()) / len(by_prompt)
    low, high = wilson_interval(rate * len(by_prompt), len(by_prompt))
    return Tally(choices.count("tuned"), choices.count("base"), choices.count("tie"), len(by_prompt), rate, low, high)


def tally_line(found: Tally) -> str:
    """The tally as a sentence."""
    share, low, high = (f"{100 * value:.0f}\u00a0%" for value in (found.rate, found.low, found.high))
    return (
        f"People who did not know which was which preferred the trained model to the untouched one in {share} [{low}, {high}]: "
        f"{found.tuned} votes for it, {found.base} against, {found.ties} ties, on {found.prompts} prompts."
    )
