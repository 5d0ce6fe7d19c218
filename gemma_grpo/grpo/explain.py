"""What a step's numbers mean where a user would otherwise wonder, and the setting that changes it."""

from __future__ import annotations

from gemma_grpo.config import GRPOConfig
from gemma_grpo.types import StepRecord


def step_warnings(record: StepRecord, config: GRPOConfig, earlier_retries: int) -> list[str]:
    """Sentences to warn with after a step; usually none. `earlier_retries` is the oom_retries of the step before."""
    metrics, said = record.metrics, []
    if metrics["frac_reward_zero_std"] == 1.0:
        said.append(
            "in every group all completions got the same reward, so nothing was learned from rewards. "
            "Raise temperature or num_generations, or use a finer reward."
        )
    if metrics["passes"] < config.planning_steps:
        said.append(f"kl.step_limit was reached after {metrics['passes']:.0f} planning steps.")
    if metrics["oom_retries"] > earlier_retries:
        said.append(
            "memory ran out, and the pass was repeated in smaller pieces, to the same gradient. "
            f"memory.token_budget={metrics['token_budget']:.0f} in the recipe skips the attempt next time."
        )
    return [f"step {record.step}: {text}" for text in said]
