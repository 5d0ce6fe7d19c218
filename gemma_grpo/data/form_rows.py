"""Rows of each form, and how they are read as prompt, chosen and rejected: only columns and their types, no turns.

Sources: TRL's dataset formats (huggingface.co/docs/trl/dataset_formats), UltraFeedback (arXiv:2310.01377), the preference columns that
LLaMA-Factory's data/README.md gives for Alpaca and ShareGPT, OpenAI's preference fine-tuning. Which form counts is forms.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from gemma_grpo.data.rejections import UnusableRowError

Row: TypeAlias = Mapping[Any, Any]

_QUESTIONS = ("instruction", "question", "query")
_REPLIES = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
_SCORES = tuple((part.format("chosen"), part.format("rejected")) for part in ("score_{}", "{}_score", "{}_rating", "{}_avg_rating"))
_TALKS = ("conversations", "conversation", "messages")
_LISTS = ("completions", "generations", "responses")
_RATINGS = ("ratings", "rating", "scores")
_SCORE_OF_ONE = ("overall_score", "score", "rating", "fine-grained_score")
_TEXT_OF_ONE = ("response", "text", "content", "completion")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "system": "system"}
_TRANSCRIPT = re.compile(r"(?:\A\s*|\n\r?\n)(?:Human|Assistant):")
_SPEAKER = re.compile(
    r"(?im)^[^\w\n]{0,9}(?:human|user|assistant|instruction|response)[^\w\n]{0,5}:|<\|?\w{1,30}\|>|\[/?INST\]|<(?:start|end)_of_turn>"
)
"""Another format's turn markers; bounded, so that no text takes more than linear time."""


# ---- which form a row has


def has(row: Row, *columns: str) -> bool:
    return all(row.get(column) is not None for column in columns)


def reply_columns(row: Row) -> tuple[str, str] | None:
    """The names of the columns with the better and the worse reply."""
    return next((names for names in _REPLIES if has(row, *names)), None)


def _question(row: Row) -> str | None:
    return next((name for name in ("prompt", *_QUESTIONS) if has(row, name)), None)


def _is_list(value: Any, of: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, of) for item in value)


def talk_column(row: Row) -> str | None:
    """The column with the conversation's messages."""
    return next((name for name in _TALKS if _is_list(row.get(name), Mapping)), None)


def is_sharegpt(row: Row) -> bool:
    if not reply_columns(row) or _question(row):
        return False
    sides = [row[name] for name in reply_columns(row) or ()]
    spoken = [side[0] if isinstance(side, list) and side else side for side in sides]
    return talk_column(row) is not None or any(isinstance(item, Mapping) and "from" in item for item in spoken)


def is_scored(row: Row) -> bool:
    return _question(row) is not None and _is_list(row.get("completions"), Mapping)


def is_rated(row: Row) -> bool:
    return _question(row) is not None and any(_is_list(row.get(name), str) for name in _LISTS) and _ratings(row) is not None


def _ratings(row: Row) -> str | None:
    return next((name for name in _RATINGS if isinstance(row.get(name), list)), None)


def is_alpaca(row: Row) -> bool:
    return not has(row, "prompt") and _question(row) is not None and (reply_columns(row) is not None or _two_outputs(row))


def _two_outputs(row: Row) -> bool:
    return _is_list(row.get("output"), str) and len(row["output"]) == 2


def is_openai(row: Row) -> bool:
    return has(row, "input", "preferred_output", "non_preferred_output")


def is_implicit(row: Row, kind: type) -> bool:
    return any(isinstance(row[name], kind) for name in reply_columns(row) or ()) and not has(row, "prompt")


def is_plain(row: Row) -> bool:
    names = reply_columns(row) or ()
    return is_implicit(row, str) and all(isinstance(row[name], str) and not _TRANSCRIPT.search(row[name]) for name in names)


# ---- rows as prompt, chosen and rejected


def compared(row: Row) -> dict[Any, Any]:
    """The row itself, its replies under chosen and rejected, unless its own scores say that neither is better, or the other one."""
    names = reply_columns(row)
    if names is None:
        raise UnusableRowError("not_a_pair")
    for better, worse in _SCORES:
        chosen, rejected = _number(row.get(better)), _number(row.get(worse))
        if chosen is not None and rejected is not None and chosen <= rejected:
            raise UnusableRowError("tie" if chosen == rejected else "scores_contradict")
    return _without(row, names) | {"chosen": row[names[0]], "rejected": row[names[1]]}


def after_common_beginning(row: Row) -> dict[Any, Any]:
    """Two plain texts: what they begin with alike, up to a white space, is the prompt (TRL's implicit form)."""
    found = compared(row)
    chosen, rejected = found["chosen"], found["rejected"]
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise UnusableRowError("not_a_pair")
    end = next((n for n, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other), min(len(chosen), len(rejected)))
    while end and not chosen[end - 1].isspace():  # never within a word
        end -= 1
    prompt = chosen[:end]
    if not prompt.strip():
        raise UnusableRowError("no_common_prompt")
    if _SPEAKER.search(prompt):
        raise UnusableRowError("unknown_turns")
    return found | {"prompt": prompt, "chosen": chosen[end:], "rejected": rejected[end:]}


def from_scored(row: Row) -> dict[Any, Any]:
    """UltraFeedback: of all completions the best against the worst."""
    given = row.get("completions")
    replies = [(_text_of(one), _score_of(one)) for one in (given if isinstance(given, list) else ()) if isinstance(one, Mapping)]
    return _asked(row, ("completions",)) | _best_and_worst(replies)


def from_rated(row: Row) -> dict[Any, Any]:
    texts, ratings = next((name for name in _LISTS if _is_list(row.get(name), str)), None), _ratings(row)
    if texts is None or ratings is None or len(row[texts]) != len(row[ratings]):
        raise UnusableRowError("not_a_pair")
    replies = [(text, _number(rating)) for text, rating in zip(row[texts], row[ratings], strict=True)]
    return _asked(row, (texts, ratings)) | _best_and_worst(replies)


def _best_and_worst(replies: Sequence[tuple[str | None, float | None]]) -> dict[str, Any]:
    """The first of the best and the first of the worst replies that have a text and a score."""
    scored = [(text, score) for text, score in replies if text is not None and score is not None]
    if len(scored) < 2:
        raise UnusableRowError("too_few_scores")
    best, worst = max(scored, key=lambda one: one[1]), min(scored, key=lambda one: one[1])
    if best[1] == worst[1]:
        raise UnusableRowError("tie")
    return {"chosen": best[0], "rejected": worst[0], "score_chosen": best[1], "score_rejected": worst[1]}


def _text_of(one: Row) -> str | None:
    return next((one[name] for name in _TEXT_OF_ONE if isinstance(one.get(name), str)), None)


def _score_of(one: Row) -> float | None:
    """A completion's own score, else the mean of its aspects' ratings."""
    own = next((score for name in _SCORE_OF_ONE if (score := _number(one.get(name))) is not None), None)
    aspects = one.get("annotations")
    if own is not None or not isinstance(aspects, Mapping):
        return own
    ratings = [_number(aspect.get("Rating")) for aspect in aspects.values() if isinstance(aspect, Mapping)]
    known = [rating for rating in ratings if rating is not None]
    return sum(known) / len(known) if known else None


def from_alpaca(row: Row) -> dict[Any, Any]:
    if _two_outputs(row):
        return _asked(row, ("output",)) | {"chosen": row["output"][0], "rejected": row["output"][1]}
    return _asked(compared(row), ())


def from_sharegpt(row: Row) -> dict[Any, Any]:
    found, talk = compared(row), talk_column(row)
    sides = {side: _spoken(found[side]) for side in ("chosen", "rejected")}
    if talk is None:
        return found | sides
    prompt = _with_system(row, _spoken(row[talk]))
    if len(prompt) > 1 and prompt[-1]["role"] == "assistant":
        prompt.pop()  # the conversation as it went on: what the replies are put in place of
    return _without(found, (talk, "system")) | {"prompt": prompt} | sides


def from_openai(row: Row) -> dict[Any, Any]:
    given = row.get("input")
    if not isinstance(given, Mapping) or not has(row, "preferred_output", "non_preferred_output"):
        raise UnusableRowError("not_a_pair")
    sides = {"chosen": _spoken(row["preferred_output"]), "rejected": _spoken(row["non_preferred_output"])}
    return _without(row, ("input", "preferred_output", "non_preferred_output")) | {"prompt": _spoken(given.get("messages"))} | sides


def from_rejected_response(row: Row) -> dict[Any, Any]:
    """The conversation with its good end in `messages`, the worse end beside it."""
    turns = _spoken(row.get("messages"))
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or not isinstance(row.get("rejected_response"), str):
        raise UnusableRowError("not_a_pair")
    sides = {"chosen": [turns[-1]], "rejected": [{"role": "assistant", "content": row["rejected_response"]}]}
    return _without(row, ("messages", "rejected_response", "system")) | {"prompt": _with_system(row, turns[:-1])} | sides


def from_conversations(row: Row) -> dict[Any, Any]:
    name = next((name for name in ("conversations", "conversation") if has(row, name)), None)
    if name is None:
        raise UnusableRowError("not_a_prompt")
    try:
        return _without(row, (name, "system")) | {"messages": _with_system(row, _spoken(row[name]))}
    except UnusableRowError:
        raise UnusableRowError("not_a_prompt") from None


def _asked(row: Row, read: Sequence[str]) -> dict[Any, Any]:
    """The row with its question, the input that belongs to it, system text and earlier turns as one prompt."""
    name = _question(row)
    if name is None:
        raise UnusableRowError("not_a_pair")
    rest = _without(row, (*read, name, "input", "system", "system_prompt", "history"))
    question, given = row[name], row.get("input")
    if isinstance(question, str) and isinstance(given, str) and given.strip():
        question = f"{question.strip()}\n\n{given.strip()}"
    earlier = [*_history(row.get("history"))]
    system = next((row[column] for column in ("system", "system_prompt") if isinstance(row.get(column), str) and row[column].strip()), None)
    if not isinstance(question, str) or (system is None and not earlier):
        return rest | {"prompt": question}
    before = [] if system is None else [{"role": "system", "content": system}]
    return rest | {"prompt": [*before, *earlier, {"role": "user", "content": question}]}


def _history(value: Any) -> list[dict[str, str]]:
    """Earlier turns as pairs of a question and its answer."""
    if not value:
        return []
    if not isinstance(value, list) or not all(_is_list(turn, str) and len(turn) == 2 for turn in value):
        raise UnusableRowError("not_a_pair")
    return [{"role": role, "content": text} for turn in value for role, text in zip(("user", "assistant"), turn, strict=True)]


def _with_system(row: Row, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or (turns and turns[0]["role"] == "system"):
        return turns
    return [{"role": "system", "content": system}, *turns]


def _spoken(value: Any) -> list[dict[str, Any]]:
    """One text of the assistant's, one message, or a list of them; from/value or role/content, as role/content."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    items = [value] if isinstance(value, Mapping) else value
    if not _is_list(items, Mapping):
        raise UnusableRowError("not_a_pair")
    roles = [item.get("role", item.get("from")) for item in items]
    if not all(isinstance(role, str) and role in _ROLES for role in roles):
        raise UnusableRowError("not_a_pair")
    return [{"role": _ROLES[role], "content": item.get("content", item.get("value"))} for role, item in zip(roles, items, strict=True)]


def _number(value: Any) -> float | None:
    """A finite number, also as a table's text; None for anything else, such as N/A."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _without(row: Row, names: Iterable[str]) -> dict[Any, Any]:
    read = set(names)
    return {name: value for name, value in row.items() if name not in read}
