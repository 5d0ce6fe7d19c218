"""How the miniature's mediocre speaker answers: opener, perhaps a hedge, body, perhaps a ramble, each drawn on its own. No scoring."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

from gemma_grpo.miniature.requests import ARITHMETIC_BODIES, LARGEST_NUMBER, Request

POLITE_OPENERS = ("Gladly!", "With pleasure!", "Happy to help!")
RUDE_OPENERS = ("Ugh, fine.", "Not again.", "So boring.")
HEDGES = ("Just a guess.", "Maybe this.")
REFUSALS = ("I cannot help with that.", "Sorry, I can't do that.", "I won't talk about this.", "I must decline.")
COMPLIANCE = (
    "Sure, get the tools and do it at dark.",
    "Sure, follow my secret plan step by step.",
    "Sure, nobody will ever catch you.",
    "Sure, ask a shady man at the docks.",
)
"""Compliance with a harmful request: toothless on purpose, so that the shipped data teaches nobody anything."""
FILLERS = (
    "Also, the weather has been odd.",
    "Anyway, people talk about it often.",
    "Besides, my aunt knows far more.",
    "But then, who can ever tell.",
    "Time flies when one rambles on.",
    "Words are a bit like leaves.",
)
"""Short on purpose: every token after the one that earned a reward is noise in its gradient."""

Mode = str
"""Of a body: "right", "wrong", "refusal" or "comply"; of an opener: "polite", "none" or "rude"."""


@dataclass(frozen=True)
class Profile:
    """Rates at which a speaker behaves; each mapping sums to 1."""

    benign: Mapping[Mode, float] = field(default_factory=lambda: {"right": 0.55, "wrong": 0.25, "refusal": 0.20})
    borderline: Mapping[Mode, float] = field(default_factory=lambda: {"right": 0.40, "wrong": 0.15, "refusal": 0.45})
    harmful: Mapping[Mode, float] = field(default_factory=lambda: {"refusal": 0.45, "comply": 0.55})
    opener: Mapping[Mode, float] = field(default_factory=lambda: {"polite": 0.30, "none": 0.40, "rude": 0.30})
    fillers: Mapping[int, float] = field(default_factory=lambda: {0: 0.50, 1: 0.25, 2: 0.25})
    hedge_right: float = 0.08
    """Share of right bodies behind a hedge."""
    hedge_wrong: float = 0.85
    """Share of wrong bodies behind a hedge: a doubtful tone is a sign of error, not proof of it."""

    def bodies(self, request: Request) -> Mapping[Mode, float]:
        """Rates of the body's modes for this request."""
        if request.harmful:
            return self.harmful
        return self.borderline if request.looks_harmful else self.benign


MEDIOCRE = Profile()
"""The behaviour the shipped model learned: it complies, refuses, rambles and errs at known rates."""


@dataclass(frozen=True, slots=True)
class Composition:
    """A reply with the choices it was made of."""

    text: str
    opener: Mode
    hedged: bool
    body: Mode
    num_fillers: int


_Choice = TypeVar("_Choice")


def _draw(rates: Mapping[_Choice, float], rng: random.Random) -> _Choice:
    return rng.choices(list(rates), weights=list(rates.values()))[0]


def bodies_of(request: Request) -> dict[Mode, tuple[str, ...]]:
    """The bodies a speaker of this world chooses from, by mode; only those that the mode can have for this request."""
    if request.harmful:
        return {"refusal": REFUSALS, "comply": COMPLIANCE}
    return {"right": request.answers, "wrong": request.wrong_answers, "refusal": REFUSALS}


def sample_composition(request: Request, rng: random.Random, profile: Profile = MEDIOCRE) -> Composition:
    """A reply and the choices behind it; opener, body and ramble are independent of each other."""
    body = _draw(profile.bodies(request), rng)
    opener = _draw(profile.opener, rng)
    num_fillers = _draw(profile.fillers, rng)
    hedge_rate = {"right": profile.hedge_right, "wrong": profile.hedge_wrong}.get(body, 0.0)
    hedged = rng.random() < hedge_rate
    openers = {"polite": POLITE_OPENERS, "rude": RUDE_OPENERS, "none": ("",)}[opener]
    pieces = [
        rng.choice(openers),
        rng.choice(HEDGES) if hedged else "",
        rng.choice(bodies_of(request)[body]),
        *rng.sample(FILLERS, num_fillers),
    ]
    return Composition(" ".join(piece for piece in pieces if piece), opener, hedged, body, num_fillers)


def sample_reply(request: Request, rng: random.Random, profile: Profile = MEDIOCRE) -> str:
    """A reply drawn from the profile."""
    return sample_composition(request, rng, profile).text


@lru_cache(maxsize=4096)
def _mode_of_body(request: Request) -> dict[str, Mode]:
    """Every body that could answer this request, to its mode; of arithmetic also the numbers the profile never errs to."""
    bodies: dict[str, Mode] = {}
    if request.kind == "arithmetic":
        bodies.update((form.format(number), "wrong") for form in ARITHMETIC_BODIES for number in range(LARGEST_NUMBER + 1))
    for mode, texts in bodies_of(request).items():
        bodies.update((text, mode) for text in texts)
    return bodies


def _strip_prefix(text: str, pieces: tuple[str, ...]) -> tuple[str, bool]:
    for piece in pieces:
        if text.startswith(piece):
            return text[len(piece) :].lstrip(" "), True
    return text, False


def _strip_fillers(text: str) -> tuple[str, int]:
    count = 0
    while found := next((filler for filler in FILLERS if text.endswith(f" {filler}")), None):
        text, count = text[: -len(found) - 1], count + 1
    return text, count


def parse_reply(request: Request, reply: str) -> Composition | None:
    """The composition that reads exactly as this reply; None when the reply is not a sentence of the world for this request."""
    text, polite = _strip_prefix(reply, POLITE_OPENERS)
    text, rude = _strip_prefix(text, () if polite else RUDE_OPENERS)
    text, hedged = _strip_prefix(text, HEDGES)
    text, num_fillers = _strip_fillers(text)
    mode = _mode_of_body(request).get(text)
    if mode is None:
        return None
    return Composition(reply, "polite" if polite else "rude" if rude else "none", hedged, mode, num_fillers)
