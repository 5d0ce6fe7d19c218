"""The nouns that flow from stage to stage: plain, frozen, unpadded Python. No torch.

Axes: N prompts, G completions of each, P prompt tokens, C completion tokens. Log-probabilities are natural
logarithms, token-aligned: entry t scores token t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

Role = Literal["system", "user", "assistant"]
Finish = Literal["stop", "length"]
Side = Literal["base", "tuned"]
"""Of a run's model: its adapter off or on."""


class Message(TypedDict):
    """One turn of a conversation, in the field's usual form."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two replies to one conversation, the first preferred by a person."""

    pair_id: str
    source: str
    """Where the row came from, such as "harmless-base": preferences of different sources can contradict each other."""
    messages: tuple[Message, ...]
    """The conversation both replies continue; its last turn is the user's."""
    chosen: str
    rejected: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the row, handed to rewards."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as the model reads it: one <bos>, and at its end the open model turn."""

    prompt_id: str
    source: str
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    conversation_id: str
    """Hash of the first user turn: prompts of one conversation are never separated by a split or a bootstrap draw."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the dataset row, handed to rewards; "chosen" is the dataset's preferred reply, if it has one."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled reply."""

    text: str
    """Decoded without the stop token."""
    token_ids: tuple[int, ...]
    """The stop token included when finish is "stop"."""
    sampling_logprobs: tuple[float, ...]
    """Log-probability of each token under the distribution it was drawn from, temperature and filters included."""
    finish: Finish


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """One prompt and the G completions sampled for it by one policy."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    policy_step: int


@dataclass(frozen=True, slots=True)
class TokenDrift:
    """How much likelier training has made each token of a completion, for people to see where."""

    tokens: tuple[str, ...]
    """As the vocabulary spells them."""
    log_ratios: tuple[float, ...]
    """log policy - log reference when it was sampled, in nats."""


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A rollout group with its rewards and advantages."""

    group: RolloutGroup
    rewards: tuple[float | None, ...]
    """Weighted sum of the shaped parts, one per completion; None where no reward could score it."""
    reward_parts: Mapping[str, tuple[float | None, ...]]
    """Each reward's raw value before shaping and weighting."""
    advantages: tuple[float, ...]
    drifts: tuple[TokenDrift, ...] = ()
    """One per completion in the group of a step that is learned from most; empty in others, and where there was no reference pass."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one training step measured."""

    step: int
    seconds: Mapping[str, float]
    """Wall time by phase: rollout, reward, reference, update."""
    metrics: Mapping[str, float]
