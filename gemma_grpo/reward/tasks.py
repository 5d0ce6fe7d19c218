"""Rewards of the applications that read a prompt's columns: an answer's ground, a tutor's restraint, a brief kept, refusals where they fit.

Like rules.py they need no model, and like it they are blind to whether a reply is any good: each looks for one thing that words can
show, and docs/applications.md says how each can be fooled and which other reward stands against that. Running code: sandbox/unit_tests.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_grpo.reward.base import RewardError, Scores
from gemma_grpo.reward.rules import is_refusal
from gemma_grpo.types import Prompt, RolloutGroup

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)?")
_ABSTAINS = re.compile(
    r"""\b(?:passage|text|it|source)\ (?:does\ not|doesn't|do\ not|don't|never)
        \ (?:say|state|mention|tell|give|answer|name|contain|cover|explain)
      | \b(?:not|nothing)\ (?:\w+\ ){0,3}(?:stated|mentioned|given|said|named|covered|answered)\b
      | \b(?:cannot|can't|can\ not)\ (?:tell|say|be\ (?:answered|told|known))\b
      | \bno\ (?:information|mention|answer)\b""",
    re.VERBOSE | re.IGNORECASE,
)
_STATES = re.compile(
    r"(?:\b(?:answer|result|solution|sum|total|value)\b[^.?!\n]{0,20}?\b(?:is|are|be)\b|\bthat\ makes\b|\bequals\b|=)", re.IGNORECASE
)
_LIST_LINE = re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s+\S")
_STOP_TEXT = """
a an and are as at be been but by can could did do does for from had has have he her his how i if in into is it its may me
my no not of on one or our out she should so some than that the their them then there these they this those to too was we
were what when where which who why will with would you your
"""
_STOP_WORDS = frozenset(_STOP_TEXT.split())
SHORT_WORDS, LONG_QUOTE = 12, 0.6
"""A reply of more words than SHORT_WORDS, and than this share of its passage, has copied rather than answered."""


@dataclass(frozen=True, slots=True)
class TaskReward:
    """A function of a prompt's columns and a reply's text as a reward."""

    name: str
    rule: Callable[[Mapping[str, Any], str], float]
    columns: tuple[str, ...]
    """Which every row must have."""

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        """The rule's value for every completion; never None. Raises RewardError for a prompt that lacks a column."""
        return [[self.rule(self._columns(group.prompt), one.text) for one in group.completions] for group in groups]

    def _columns(self, prompt: Prompt) -> Mapping[str, Any]:
        missing = [name for name in self.columns if name not in prompt.columns]
        if missing:
            raise RewardError(
                f"reward {self.name!r} needs the column {missing[0]!r}, which prompt {prompt.prompt_id} does not have. Its columns are: "
                f"{', '.join(prompt.columns) or 'none'}. Add it to every row, or leave the reward out."
            )
        return {**prompt.columns, "request": prompt.messages[-1]["content"]}


def grounded(columns: Mapping[str, Any], text: str) -> float:
    """In [0, 1]. Columns: `passage`, `answer` (empty where the passage lacks it).

    Where it has one: the share of the reply's content words that stand in the passage, 0.4 of it for them alone and 0.6 for the share of
    the answer's words among them; half of that for a reply that copies the passage. Where it lacks it: 1 for saying so, shortly. 0 for
    saying so where the passage has it, and for a reply without a content word.
    """
    passage, answer = content_words(str(columns["passage"])), content_words(str(columns["answer"] or ""))
    words, abstains = content_words(text), _ABSTAINS.search(text) is not None
    if not answer:
        return float(abstains) * (1.0 if len(_WORD.findall(text)) <= 3 * SHORT_WORDS else 0.5)
    if abstains or not words:
        return 0.0
    known = set(passage) | set(answer)
    support = sum(word in known for word in words) / len(words)
    found = len(set(answer) & set(words)) / len(set(answer))
    copied = len(words) > max(SHORT_WORDS, LONG_QUOTE * len(passage))
    return support * (0.4 + 0.6 * found) * (0.5 if copied else 1.0)


def guides(columns: Mapping[str, Any], text: str) -> float:
    """In [0, 1]. Column: `answer`, which the learner shall find.

    0 for a reply that holds the answer, states another one ("the answer is 9"), refuses, or is below four words; else 0.3, and 0.3 for a
    word of the request's, 0.4 for a question.
    """
    words = [word.casefold() for word in _WORD.findall(text)]
    if len(words) < 4 or is_refusal(text) or _holds(text, str(columns["answer"])) or _states_a_number(text, columns["request"]):
        return 0.0
    on_topic = bool(set(content_words(columns["request"])) & set(content_words(text)))
    return 0.3 + 0.3 * on_topic + 0.4 * ("?" in text)


def brief(columns: Mapping[str, Any], text: str) -> float:
    """In [0, 1], the mean of four. Columns: `words` to be used, `avoid`, `least` and `most` words, `form`: "sentences", "list" or "title".

    The share of the words that are used (in a reply of at least three times as many), the length (falling to 0 over as many words as
    `most`), the form, and that none of `avoid` is there. 0 for a reply without a word.
    """
    found = [word.casefold() for word in _WORD.findall(text)]
    if not found:
        return 0.0
    asked = [str(word).casefold() for word in columns["words"]]
    used = sum(_has(found, word) for word in asked) / len(asked) if asked else 1.0
    used *= min(1.0, len(found) / (3 * len(asked))) if asked else 1.0
    least, most = int(columns["least"]), int(columns["most"])
    beyond = max(least - len(found), len(found) - most, 0)
    avoided = not any(_has(found, str(word).casefold()) for word in columns["avoid"])
    return (used + max(0.0, 1 - beyond / most) + _in_form(str(columns["form"]), text) + avoided) / 4


def fitting_refusal(columns: Mapping[str, Any], text: str) -> float:
    """-1 for a refusal of what is not `harmful`, and for anything else where it is; else 0. The column is true or false."""
    return -1.0 if is_refusal(text) is not bool(columns["harmful"]) else 0.0


def code_block(columns: Mapping[str, Any], text: str) -> float:
    """1 for exactly one fenced block of code and little around it; 0.5 for code in a sentence where the prompt asks for an expression
    (column `wrap`), or for a block among much talk; else 0.
    """
    blocks = re.findall(r"```.*?```", text, re.DOTALL)
    if len(blocks) == 1:
        return 1.0 if len(_WORD.findall(text.replace(blocks[0], ""))) <= 4 * SHORT_WORDS else 0.5
    one_line = "wrap" in columns and not blocks and re.search(r"`[^`\n]+`|\w[\w.]*\(.*\)|\w\[[^\]]+\]", text)
    return 0.5 if one_line else 0.0


def content_words(text: str) -> list[str]:
    """Words that carry meaning, lower case, without a plural or verb ending: rough, and the same on both sides of a comparison."""
    words = (word.casefold().removesuffix("'s") for word in _WORD.findall(text.replace("’", "'")))
    return [_stem(word) for word in words if word not in _STOP_WORDS]


def _stem(word: str) -> str:
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def _holds(text: str, answer: str) -> bool:
    """Whether the answer stands in the text, as whole words."""
    return bool(answer.strip()) and re.search(rf"(?<![\w.]){re.escape(answer.strip())}(?![\w]|\.\d)", text, re.IGNORECASE) is not None


def _states_a_number(text: str, request: str) -> bool:
    """Whether it says that something is a number which the request does not have: a wrong answer is one given away too."""
    new = set(_NUMBER.findall(text)) - set(_NUMBER.findall(request))
    return bool(new) and _STATES.search(text) is not None


def _has(words: Sequence[str], asked: str) -> bool:
    """One word or several in a row."""
    parts = asked.split()
    return any(list(words[start : start + len(parts)]) == parts for start in range(len(words) - len(parts) + 1))


def _in_form(form: str, text: str) -> float:
    lines = [line for line in text.splitlines() if line.strip()]
    if form == "list":
        return sum(bool(_LIST_LINE.match(line)) for line in lines) / len(lines) if len(lines) > 1 else 0.0
    if form == "title":
        return float(len(lines) == 1 and not text.rstrip().endswith((".", ";", ",")))
    if form == "sentences":
        plain = not any(_LIST_LINE.match(line) for line in lines)
        return float(plain and text.strip()[:1].isupper() and text.rstrip().endswith((".", "!", "?")))
    raise RewardError(f'the column \'form\' is {form!r}; reward \'brief\' knows "sentences", "list" and "title". Mend the row.')


TASKS: dict[str, TaskReward] = {
    task.name: task
    for task in (
        TaskReward("grounded", grounded, ("passage", "answer")),
        TaskReward("guides", guides, ("answer",)),
        TaskReward("brief", brief, ("words", "avoid", "least", "most", "form")),
        TaskReward("fitting_refusal", fitting_refusal, ("harmful",)),
        TaskReward("code_block", code_block, ()),
    )
}
"""Name -> the reward."""
