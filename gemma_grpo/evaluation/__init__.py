"""Numbers of an evaluation, with intervals: before against after, win rates, frontiers. No model is run here."""

from gemma_grpo.evaluation.before_after import (
    EvaluatedReply,
    higher_score,
    is_harmful,
    looks_harmful,
    paired_metric,
    refusals,
    summarise,
    swapped_preference,
)
from gemma_grpo.evaluation.frontier import Frontier, best_of_n_kl, fit_frontier, frontier_report
from gemma_grpo.evaluation.intervals import bootstrap_intervals, percentile_levels
from gemma_grpo.evaluation.win_rate import length_controlled

__all__ = [
    "EvaluatedReply",
    "Frontier",
    "best_of_n_kl",
    "bootstrap_intervals",
    "fit_frontier",
    "frontier_report",
    "higher_score",
    "is_harmful",
    "length_controlled",
    "looks_harmful",
    "paired_metric",
    "percentile_levels",
    "refusals",
    "summarise",
    "swapped_preference",
]
