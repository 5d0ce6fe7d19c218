"""Settings of the machines a run has: they decide speed, memory and when to give up, never what is learned."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gemma_grpo.config.base import Count, Positive, Stage, Whole


class MemorySettings(Stage):
    """How much is held at a time. It decides speed and memory, never the result: gradients and completions stay the same."""

    limit_gib: Positive | None = None
    """Device memory this run may use, GiB (2^30 bytes); null takes what the card (or without one the machine) has."""
    token_budget: Count | None = None
    """Tokens of one forward and backward pass, prompt and completions; null takes what batch_size full groups hold, if it fits."""
    kv_token_budget: Count | None = None
    """Tokens of keys and values held at a time while sampling; null samples a whole step's prompts together, if they fit."""


class WatchdogSettings(Stage):
    """Says what is waited for when a phase of a step takes far longer than it used to; it never ends anything."""

    factor: Annotated[float, Field(gt=1)] | None = 10.0
    """Times its own median that a phase may take before a line says so; null switches the watchdog off."""
    floor_seconds: Positive = 60.0
    """No line before so many seconds; ten times as many for a phase whose usual length is not known yet."""


class RanksSettings(Stage):
    """How several processes work on one run. None of it changes what is computed."""

    timeout_seconds: Positive = 600.0
    """How much later than the others a rank may have done its share before it is given up."""
    grace_seconds: Positive = 60.0
    """What ranks that were asked to stop have to save in, before they are killed."""
    max_restarts: Whole = 0
    """Times that all are started again after one has failed, to go on from the last checkpoint."""
