"""The advice names the phase that took most, how far it is from its floor, and settings that exist and change it."""

from __future__ import annotations

from typing import Any

import pytest

from gemma_grpo.config import build_config
from gemma_grpo.profile.advice import advice

PHASES = ("rollout", "reward", "reference", "update", "other")


def told(largest: str, *, floor: float, judges: tuple[str, ...] = (), **settings: Any) -> str:
    """The advice when one phase took 6 of 10 seconds."""
    seconds = {**dict.fromkeys(PHASES, 1.0), largest: 6.0}
    return advice({name: (spent, floor if name == largest else 0.5) for name, spent in seconds.items()}, build_config(settings), judges)


def test_the_largest_phase_is_named_with_its_share_and_its_distance() -> None:
    assert told("rollout", floor=1.5).startswith("rollout took 60% of the time, 4.0 times its floor. ")
    assert told("other", floor=0.0, save_steps=0) == "other took 60% of the time. That is writing: look at the disk."


@pytest.mark.parametrize(
    ("phase", "floor", "settings", "expected"),
    [
        ("rollout", 1.0, {}, "sample more replies together (batch_size, gradient_accumulation_steps), or shorter ones"),
        ("rollout", 1.0, {"memory.kv_token_budget": 900}, "leave memory.kv_token_budget out"),
        ("rollout", 4.0, {}, "It is near what the machine can do: only fewer or shorter completions take less"),
        ("reward", 0.0, {}, "It is the rewards' own code: let it score all completions of a call at once"),
        ("reward", 1.0, {"judges": ("judge",)}, "What is not judge is the other rewards' own code."),
        ("reward", 4.0, {"judges": ("judge",)}, "only fewer or shorter completions take less"),
        ("reference", 1.0, {}, "kl.placement=off leaves this pass out, and the leash to the reference with it."),
        ("update", 1.0, {"planning_steps": 3}, "planning_steps=2 makes one pass less over each rollout."),
        ("update", 1.0, {"gradient_checkpointing": True}, "gradient_checkpointing=false saves the second forward pass"),
        ("update", 1.0, {"planning_steps": 1, "gradient_checkpointing": False}, "Only fewer or shorter completions take less"),
        ("update", 1.0, {"memory.token_budget": 512}, "memory.token_budget=512 cuts it into small passes"),
        ("update", 1.0, {"batch_size": 2, "gradient_accumulation_steps": 8}, "batch_size=16 gradient_accumulation_steps=1 makes fewer"),
        ("other", 0.0, {"save_steps": 5}, "A larger save_steps writes fewer checkpoints."),
    ],
)
def test_what_is_said_changes_that_phase(phase: str, floor: float, settings: dict[str, Any], expected: str) -> None:
    assert expected in told(phase, floor=floor, **settings)


@pytest.mark.parametrize("phase", ["reference", "update"])
def test_near_the_floor_larger_passes_are_not_offered(phase: str) -> None:
    assert "larger passes" not in told(phase, floor=4.0, gradient_accumulation_steps=8)
    assert "larger passes" in told(phase, floor=1.0, gradient_accumulation_steps=8)
