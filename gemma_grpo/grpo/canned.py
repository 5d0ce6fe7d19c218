"""Do the rewards tell a good reply from a bad one, before anything is trained? On replies that stand beside the prompts.

Owns what is asked and how it is told. The replies are the columns `chosen` and `bad` of a dataset's rows: data/bundled.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from gemma_grpo.config import GRPOConfig
from gemma_grpo.data.bundled import canned_replies
from gemma_grpo.data.chat import reply_ids
from gemma_grpo.grpo.setup import TRAINED, TrainingData, build_reward_stack
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.planner import PreflightError
from gemma_grpo.reward.base import StackScores
from gemma_grpo.rollout.engine import RolloutEngine
from gemma_grpo.types import Completion, RolloutGroup

SHOWN = 3
"""Prompts told of in the refusal."""


def canned_report(
    reward: Any, weights: Mapping[str, float], model: Gemma, engine: RolloutEngine, data: TrainingData, config: GRPOConfig
) -> dict[str, Any] | None:
    """What the rewards of a run, all but one that is still to be trained, make of the good and the bad reply of each prompt.

    None where no prompt has both, or no reward is there to ask. A prompt whose good reply is longer than any that training could
    sample is left out and counted.
    """
    groups = [group for prompt in (*data.prompts, *data.held_out_prompts) if (group := _group(prompt, model)) is not None]
    asked = {name: weight for name, weight in weights.items() if name != TRAINED}
    if not groups or not asked:
        return None
    fitting = [group for group in groups if len(group.completions[0].token_ids) <= config.max_completion_length]
    scores = build_reward_stack(reward, asked, model, config, 0.0, engine=engine).score(fitting)
    lost = [_lost(group, n, scores) for n, group in enumerate(fitting) if not _wins(scores.rewards[n])]
    return {
        **{"prompts": len(fitting), "too_long": len(groups) - len(fitting), "won": len(fitting) - len(lost), "lost": lost},
        "parts": {name: _means(rows) for name, rows in scores.parts.items() if fitting},
        **{"not_asked": [name for name in weights if name not in asked], "warnings": list(scores.warnings)},
    }


def check_canned(report: dict[str, Any] | None) -> dict[str, Any] | None:
    """The report as it came. Raises PreflightError naming what lost."""
    if report is not None and report["lost"]:
        shown, more = report["lost"][:SHOWN], len(report["lost"]) - SHOWN
        told = "; ".join(shown) + (f"; and {more} more" if more > 0 else "")
        said = "".join(f" Also: {warning}" for warning in report["warnings"])
        raise PreflightError(
            f"the rewards put a bad canned reply at or above the good one on {len(report['lost'])} of {report['prompts']} prompts: {told}. "
            f"A policy would learn the bad one: change the weights in `reward`, judge.rubric, or the rows' columns chosen and bad.{said}"
        )
    return report


def _group(prompt: Any, model: Gemma) -> RolloutGroup | None:
    replies = canned_replies(prompt)
    if replies is None:
        return None
    tokens = [tuple(reply_ids(model.tokenizer, text)) for text in replies]
    return RolloutGroup(
        prompt, tuple(Completion(text, ids, (0.0,) * len(ids), "stop") for text, ids in zip(replies, tokens, strict=True)), 0
    )


def _wins(row: Sequence[float | None]) -> bool:
    good, bad = row
    return good is not None and bad is not None and good > bad


def _lost(group: RolloutGroup, n: int, scores: StackScores) -> str:
    """One prompt: its last turn, both totals, and the parts they are made of."""
    asked = " ".join(group.prompt.messages[-1]["content"].split())
    totals = [_number(value) for value in scores.rewards[n]]
    parts = ", ".join(f"{name} {_number(rows[n][0])} against {_number(rows[n][1])}" for name, rows in scores.parts.items())
    return f"{asked[-60:]!r} good {totals[0]}, bad {totals[1]} ({parts})"


def _number(value: float | None) -> str:
    return "unscored" if value is None else f"{value:.2f}"


def _means(rows: Sequence[Sequence[float | None]]) -> tuple[float, float]:
    """Of the good replies and of the bad ones, as far as they were scored."""
    sides = [[row[side] for row in rows] for side in (0, 1)]
    good, bad = (fmean([value for value in side if value is not None] or [0.0]) for side in sides)
    return good, bad
