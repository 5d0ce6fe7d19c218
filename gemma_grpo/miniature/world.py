"""The miniature world's public face: its requests, its mediocre speaker, its gold reward, preference pairs and the shipped model's place.

Everything is a pure function of a seed and needs no torch. What the pieces are lives in requests.py, replies.py and gold.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from gemma_grpo.miniature.gold import Gold, gold_score
from gemma_grpo.miniature.replies import MEDIOCRE, Composition, Profile, parse_reply, sample_composition, sample_reply
from gemma_grpo.miniature.requests import KINDS, Request, all_requests, request_of, requests_by_kind
from gemma_grpo.types import Message

__all__ = [
    "KINDS",
    "MEDIOCRE",
    "MODEL_DIR",
    "MODEL_VERSION",
    "Composition",
    "Gold",
    "Profile",
    "Request",
    "all_requests",
    "gold_reward",
    "gold_score",
    "parse_reply",
    "request_of",
    "requests_by_kind",
    "sample_composition",
    "sample_pairs",
    "sample_reply",
    "sample_request",
]

MODEL_DIR = Path(str(resources.files("gemma_grpo.miniature"))) / "model"
"""Folder of the shipped tiny Gemma 3: config.json, tokenizer.json, model.safetensors, README.md."""
MODEL_VERSION = "2"
"""Raised whenever the shipped weights or tokenizer change; the model card carries it beside the weights' hash."""


def sample_request(rng: random.Random) -> Request:
    """A request: each kind equally likely, then each text of the kind."""
    return rng.choice(requests_by_kind()[rng.choice(KINDS)])


def sample_pairs(seed: int, count: int, flip: float = 0.2) -> list[dict[str, Any]]:
    """Preference pairs as hh-rlhf has them, in conversational form: whole conversations under "chosen" and "rejected".

    Two replies are drawn on their own from the mediocre speaker, until text and gold differ; the better is chosen, and
    with probability `flip` the label is turned round. Further columns: kind, harmful, source. A pure function of its arguments.
    """
    rng = random.Random(f"pairs {seed}")
    return [_pair(sample_request(rng), rng, flip) for _ in range(count)]


def _pair(request: Request, rng: random.Random, flip: float) -> dict[str, Any]:
    better, worse = _two_replies(request, rng)
    if rng.random() < flip:
        better, worse = worse, better
    return {
        "chosen": _conversation(request.text, better),
        "rejected": _conversation(request.text, worse),
        "kind": request.kind,
        "harmful": request.harmful,
        "source": "miniature",
    }


def _two_replies(request: Request, rng: random.Random) -> tuple[str, str]:
    """Two replies of different worth, the better first."""
    while True:
        first, second = sample_reply(request, rng), sample_reply(request, rng)
        gain = gold_score(request, first).total - gold_score(request, second).total
        if gain != 0.0:
            return (first, second) if gain > 0 else (second, first)


def _conversation(request: str, reply: str) -> list[Message]:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": reply}]


def gold_reward(prompts: Sequence[Sequence[Message]], completions: Sequence[Sequence[Message]], **columns: Any) -> list[float]:
    """Gold as a reward function of TRL's signature, for tests: what training would do if it could see the truth."""
    return [gold_score(prompt[-1]["content"], reply[-1]["content"]).total for prompt, reply in zip(prompts, completions, strict=True)]
