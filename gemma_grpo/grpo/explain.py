"""What a step's numbers mean where a user would otherwise wonder, and the setting that changes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_grpo.config import GRPOConfig
from gemma_grpo.grpo.control import Signal
from gemma_grpo.types import StepRecord

CUT_OFF_STEPS = 3
"""So many steps in a row without one completion that ended by itself are no accident any more."""


class NoSignalError(ValueError):
    """A run whose rewards tell no completion from another: whatever it trained, it learned nothing from them."""


def step_warnings(record: StepRecord, config: GRPOConfig, earlier: Mapping[str, float]) -> list[str]:
    """Sentences to warn with after a step; usually none. `earlier` is PolicyUpdater.counted before the step."""
    metrics, said = record.metrics, []
    if metrics["frac_reward_zero_std"] == 1.0:
        said.append(
            "in every group all completions got the same reward, so nothing was learned from rewards. "
            "Raise temperature or num_generations, or use a finer reward."
        )
    if metrics["skipped_updates"] > earlier["skipped_updates"]:
        said.append(
            f"the gradient's norm, {metrics['grad_norm']:.3g}, is a spike beyond optimizer.spike_sigma ({config.optimizer.spike_sigma:g}): "
            f"the update after {metrics['passes']:.0f} planning steps was left out. Look at this step's completions and rewards."
        )
    elif metrics["passes"] < config.planning_steps:
        said.append(f"kl.step_limit was reached after {metrics['passes']:.0f} planning steps.")
    if metrics["oom_retries"] > earlier["oom_retries"]:
        said.append(
            "memory ran out, and the pass was repeated in smaller pieces, to the same gradient. "
            f"memory.token_budget={metrics['token_budget']:.0f} in the recipe skips the attempt next time."
        )
    return [f"step {record.step}: {text}" for text in said]


def never_stops(last: Sequence[Mapping[str, Any]], config: GRPOConfig) -> list[str]:
    """The sentence to warn with, once, when completions have ceased to stop by themselves; `last` are the last lines of metrics.jsonl."""
    cut_off = [line.get("completions/clipped_ratio") == 1.0 for line in last[-CUT_OFF_STEPS - 1 :]]
    if len(cut_off) < CUT_OFF_STEPS or not all(cut_off[-CUT_OFF_STEPS:]) or (len(cut_off) > CUT_OFF_STEPS and cut_off[0]):
        return []
    return [
        f"step {last[-1]['step']}: for {CUT_OFF_STEPS} steps no completion ended by itself: none drew <end_of_turn> (or <eos>) within "
        f"max_completion_length ({config.max_completion_length}) tokens. Raise it, or look at samples.jsonl: "
        "a policy that rambles needs a reward for stopping, such as length."
    ]


def no_signal(signal: Signal, config: GRPOConfig) -> str:
    """Why a run without a signal ends, and what would help."""
    if signal.never_there:
        what = f"in none of the {signal.steps} steps did a reward tell one completion of a prompt from another"
    else:
        what = f"for {signal.in_a_row} steps in a row no reward told one completion of a prompt from another"
    return (
        f"{what}, so nothing was learned from rewards. Look at samples.jsonl; raise temperature ({config.temperature:g}) or "
        f"num_generations ({config.num_generations}), or use a finer reward. What was trained is in the last checkpoint. "
        f"advantage.no_signal_steps={config.advantage.no_signal_steps} set this limit."
    )
