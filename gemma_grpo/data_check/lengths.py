"""How long replies are, and what that gives away: length bias, empty and very long replies, refusals, what a recipe's limits cut.

Owns these findings. Lengths are in words, but for a recipe's limits, which are in tokens of a given tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gemma_grpo.config import GRPOConfig
from gemma_grpo.data.chat import judge_suffix_ids, reply_ids
from gemma_grpo.data.prompts import fit_dialogue
from gemma_grpo.data_check.findings import MOST_NAMES, Finding, Level, counted, examples_of, level_of, share_with_interval
from gemma_grpo.data_check.personal import excerpt
from gemma_grpo.data_check.rows import CheckedRow
from gemma_grpo.reward.generative import JUDGE_QUESTION
from gemma_grpo.reward.rules import is_refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG_WORDS = 1000
BIASED = 0.65
"""A share of longer chosen replies whose whole interval is above this, or below 1 - this, is serious; one that excludes 0.5 a look."""
TOKENISED = 20_000
"""Rows that are tokenised at most, evenly spread: a quarter of a minute."""


def length_findings(rows: Sequence[CheckedRow]) -> list[Finding]:
    """For pairs all of them; none for prompts."""
    pairs = [row for row in rows if row.replies]
    return [_length_bias(pairs), _empty(pairs), _long(pairs), _refusals(pairs)] if pairs else []


def _length_bias(pairs: Sequence[CheckedRow]) -> Finding:
    differences = [len(row.replies[0].split()) - len(row.replies[1].split()) for row in pairs]
    by_source: dict[str, list[int]] = {}
    for row, difference in zip(pairs, differences, strict=True):
        by_source.setdefault(row.source, []).append(difference)
    details = {"the longer wins": _longer_wins(differences)}
    if len(by_source) > 1:
        largest = sorted(by_source.items(), key=lambda item: (-len(item[1]), item[0]))[:MOST_NAMES]
        details |= {excerpt(source): _longer_wins(inside) for source, inside in largest}
    longer = sum(difference > 0 for difference in differences)
    levels = [_bias_level(one) for one in details.values()]
    level: Level = "serious" if "serious" in levels else "look" if "look" in levels else "fine"
    equal = {"of equal length": sum(difference == 0 for difference in differences)}
    return Finding("length_bias", level, longer, len(pairs), "pairs", (), details | equal)


def _longer_wins(differences: Sequence[int]) -> dict[str, Any]:
    """What a judge of length alone would score: ties count half."""
    right = sum(difference > 0 for difference in differences) + 0.5 * sum(difference == 0 for difference in differences)
    return share_with_interval(right, len(differences))


def _bias_level(share: dict[str, Any]) -> Level:
    low, high = share["interval"]
    if low > BIASED or high < 1 - BIASED:
        return "serious"
    return "look" if low > 0.5 or high < 0.5 else "fine"


def _empty(pairs: Sequence[CheckedRow]) -> Finding:
    empty = [(row, reply) for row in pairs if (reply := next((one for one in row.replies if not any(map(str.isalnum, one))), None))]
    return Finding("empty_replies", level_of(len(empty), len(pairs), 0.05), len(empty), len(pairs), "rows", examples_of(empty))


def _long(pairs: Sequence[CheckedRow]) -> Finding:
    found = [(row, max(row.replies, key=len)) for row in pairs if any(_num_words(reply) > LONG_WORDS for reply in row.replies)]
    return Finding("long_replies", level_of(len(found), len(pairs), 0.1), len(found), len(pairs), "rows", examples_of(found))


def _num_words(text: str) -> int:
    return len(text.split()) if len(text) > LONG_WORDS else 0


def _refusals(pairs: Sequence[CheckedRow]) -> Finding:
    refused = [tuple(map(is_refusal, row.replies)) for row in pairs]
    chosen, rejected = (sum(one[side] for one in refused) for side in (0, 1))
    details = {side: share_with_interval(count, len(pairs)) for side, count in (("chosen", chosen), ("rejected", rejected))}
    found = ((row, row.replies[0]) for row, one in zip(pairs, refused, strict=True) if one[0])
    level: Level = "look" if chosen > 0.3 * len(pairs) else "fine"
    return Finding("refusals", level, chosen, len(pairs), "rows", examples_of(found), details)


def truncation_finding(rows: Sequence[CheckedRow], tokenizer: PreTrainedTokenizerBase, config: GRPOConfig) -> Finding:
    """What the recipe's limits shorten and drop, in tokens."""
    reserved = len(judge_suffix_ids(tokenizer, JUDGE_QUESTION))
    step = max(1, -(-len(rows) // TOKENISED))
    looked = rows[::step]
    broken = [(row, kinds) for row in looked if (kinds := _broken_limits(row, tokenizer, config, reserved))]
    details: dict[str, Any] = counted(kind for _, kinds in broken for kind in kinds)
    if step > 1:
        details["rows tokenised"] = len(looked)
    level = level_of(len(broken), len(looked), 0.1)
    return Finding("truncation", level, len(broken), len(looked), "rows", examples_of((row, row.prompt) for row, _ in broken), details)


def _broken_limits(row: CheckedRow, tokenizer: PreTrainedTokenizerBase, config: GRPOConfig, reserved: int) -> list[str]:
    broken = []
    fitted = fit_dialogue(tokenizer, row.messages, config.max_prompt_length)
    if fitted is None:
        broken.append("prompts dropped")
    elif len(fitted.messages) < len(row.messages):
        broken.append("prompts shortened")
    if row.replies:
        lengths = [len(reply_ids(tokenizer, reply)) for reply in row.replies]
        room = config.reward_model.max_length - reserved - max(lengths)
        if fit_dialogue(tokenizer, row.messages, room) is None:
            broken.append("pairs dropped from the reward's training")
        if lengths[0] > config.max_completion_length:
            broken.append("chosen replies longer than a rollout")
    return broken
