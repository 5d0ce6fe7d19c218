"""Rewards that need no model: simple, bounded, and blind to whether a reply is any good.

Every rule is 0 for an unremarkable reply and at worst -1, so that it can only take away. They guard a learned reward
against degenerate text; alone they teach nothing. Facts and sources: docs/method.md, rewards.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gemma_grpo.reward.base import Scores, unknown_reward
from gemma_grpo.types import Completion, RolloutGroup

_WORD = re.compile(r"\w+|[^\w\s]")
_ROLE_LABEL = re.compile(r"\b(?:Human|Assistant):")
_CONTROL_TOKEN = re.compile(r"<(?:bos|eos|pad|unk|mask|start_of_turn|end_of_turn|start_of_image|end_of_image|image_soft_token|unused\d+)>")
_MARKDOWN_LINE = re.compile(r"^\s*(?:[-*+•]\s|\d+[.)]\s|#{1,6}\s|>\s|```|\|.*\|\s*$)|\*\*\S")
_EMOJI = re.compile("[\u2600-\u27bf\u2b50\u2b55\U0001f1e6-\U0001f1ff\U0001f300-\U0001faff]")
_APOSTROPHES = str.maketrans("’‘ʼ´`", "'''''")
_REFUSAL = re.compile(
    r"""
      \bI(?:\ can't|\ cannot|\ can\ not|\ couldn't|\ could\ not|\ won't|\ will\ not|\ shouldn't|\ am\ not\ going\ to|'m\ not\ going\ to)
        \ (?:(?:\w+ly|really|and\ won't|and\ will\ not)\ )?
        (?:help|assist|provide|give|do\ (?:that|this|it)|answer|support|discuss|share|comply|advise|talk
          |go\ into|tell\ you\ (?:how\ to|about|that|this)|teach|encourage|condone
          |fulfill|engage|offer|write|create)\b
    | \bI(?:'m|\ am)\ (?:\w+ly\ |so\ )?(?:sorry|afraid),?\ (?:but\ )?(?:that\ )?I
        (?:\ can't|\ cannot|\ can\ not|\ won't|\ will\ not|\ couldn't|\ don't|'m\ not|\ am\ not|'m\ unable|\ am\ unable)\b
    | \bI(?:'m|\ am)\ (?:\w+\ )?(?:unable|not\ able|not\ willing|not\ allowed|not\ permitted|not\ designed)\ to\b
    | \bI(?:'m|\ am)\ (?:not\ (?:\w+\ )?comfortable|uncomfortable)\b
    | \bI\ (?:don't|do\ not|wouldn't|would\ not)\ (?:\w+\ )?(?:feel|be)\ (?:\w+\ )?(?:comfortable|right)\b
    | \bI\ (?:must|have\ to|need\ to|respectfully|politely)\ (?:\w+ly\ )?(?:decline|refuse)\b
    | \bI(?:'d|\ would)\ (?:rather|prefer)\ not\b
    | \bI\ (?:decline|refuse)\ to\b
    | \bI\ (?:don't|do\ not)\ (?:think|believe)\ (?:that\ )?I\ (?:can|should|could)\b
    | \b(?:against|violates?)\ my\ (?:\w+\ )?(?:programming|guidelines|principles|values|policy|policies|ethics)\b
    """,
    re.VERBOSE | re.IGNORECASE,
)
_OPENING = 300
"""Characters in which a refusal must begin: further on, "I can't recommend it enough" and quoted refusals are commoner."""


@dataclass(frozen=True, slots=True)
class RuleReward:
    """A function of one completion as a reward."""

    name: str
    rule: Callable[[Completion], float]

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        """The rule's value for every completion; never None."""
        return [[self.rule(completion) for completion in group.completions] for group in groups]


def length(completion: Completion, max_completion_length: int) -> float:
    """-(tokens / max_completion_length), in [-1, 0]: brevity, whatever is said. With a negative weight: the length-only control run."""
    return 0.0 - min(1.0, len(completion.token_ids) / max_completion_length)  # not -min(...): -0.0 reads oddly in a log


def overlong(completion: Completion, max_completion_length: int) -> float:
    """Soft overlong penalty, in [-1, 0]: 0 up to L - C tokens, then linear to -1 at L; a reply cut off by the limit gets -1.

    L is max_completion_length and the buffer C a fifth of it, as in DAPO (4,096 of 20,480). Source: arXiv:2503.14476, eq. 13.
    """
    if completion.finish == "length":
        return -1.0
    buffer = max(1, max_completion_length // 5)
    excess = len(completion.token_ids) - (max_completion_length - buffer)
    return 0.0 - min(1.0, max(0.0, excess / buffer))


def repetition(completion: Completion) -> float:
    """-(1 - distinct / all 3-grams of words and punctuation marks, case aside), in (-1, 0]; 0 for fewer than 3 words."""
    words = _WORD.findall(completion.text.casefold())
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) - 1 if trigrams else 0.0


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Distinct / all n-grams of words and punctuation marks over all texts, case aside (arXiv:1510.03055); 1 where there are none."""
    lists = [_WORD.findall(text.casefold()) for text in texts]
    grams = [gram for words in lists for gram in zip(*(words[k:] for k in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 1.0


def empty(completion: Completion) -> float:
    """-1 for a reply without a single letter or digit - nothing, blanks, "...", ":" - else 0."""
    return 0.0 if any(character.isalnum() for character in completion.text) else -1.0


def role_leak(completion: Completion) -> float:
    """-1 for a reply that goes on to play the other side ("Human:", "Assistant:") or spells Gemma's control tokens, else 0."""
    return -1.0 if _ROLE_LABEL.search(completion.text) or _CONTROL_TOKEN.search(completion.text) else 0.0


def format_markup(completion: Completion) -> float:
    """-(share of lines with list markers, headings, tables, bold text or emoji), in [-1, 0]. hh-rlhf has almost none."""
    lines = [line for line in completion.text.splitlines() if line.strip()]
    marked = sum(bool(_MARKDOWN_LINE.search(line) or _EMOJI.search(line)) for line in lines)
    return -marked / len(lines) if marked else 0.0


def refusal(completion: Completion) -> float:
    """-1 for a refusal, else 0: for benign prompts, where every refusal is one too many."""
    return -1.0 if is_refusal(completion.text) else 0.0


def random_score(completion: Completion) -> float:
    """Uniform in (-1, 0], by a hash of the tokens and their log-probabilities: nothing that could be learned. For a control run."""
    drawn = json.dumps([completion.token_ids, completion.sampling_logprobs]).encode()
    return -int(hashlib.sha256(drawn).hexdigest()[:13], 16) / 16**13


def is_refusal(text: str) -> bool:
    """Whether a reply opens by declining. A word pattern: it counts phrasings, not intentions; straight and curly quotes alike."""
    return _REFUSAL.search(" ".join(text.translate(_APOSTROPHES)[:_OPENING].split())) is not None


def _limited(rule: Callable[[Completion, int], float]) -> Callable[[int], Callable[[Completion], float]]:
    return lambda limit: lambda completion: rule(completion, limit)


def _free(rule: Callable[[Completion], float]) -> Callable[[int], Callable[[Completion], float]]:
    return lambda _: rule


RULES: dict[str, Callable[[int], Callable[[Completion], float]]] = {
    "length": _limited(length),
    "overlong": _limited(overlong),
    "repetition": _free(repetition),
    "empty": _free(empty),
    "role_leak": _free(role_leak),
    "format": _free(format_markup),
    "refusal": _free(refusal),
    "random": _free(random_score),
}
"""Rule name -> max_completion_length -> the rule."""


def build_rules(names: Iterable[str], max_completion_length: int) -> list[RuleReward]:
    """The named rules as rewards. Raises ValueError for an unknown name, with the nearest one."""
    rules = []
    for name in names:
        if name not in RULES:
            raise unknown_reward(name, RULES)
        rules.append(RuleReward(name, RULES[name](max_completion_length)))
    return rules
