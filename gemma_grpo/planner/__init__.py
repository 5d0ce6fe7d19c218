"""What a run will hold in memory, before it starts: `plan_run(config, shape, card)`. Loads no torch."""

from gemma_grpo.planner.decide import PreflightError, find_shape, plan_run
from gemma_grpo.planner.phases import Phase
from gemma_grpo.planner.plan import Plan, Suggestion

__all__ = ["Phase", "Plan", "PreflightError", "Suggestion", "find_shape", "plan_run"]
