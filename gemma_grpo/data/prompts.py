"""Conversations -> Prompt: token ids within a limit, no duplicates; splits and orders that are pure functions of content.

Owns left-truncation by whole turns, for rollouts and for the reward's training alike. Parsing rows is hh_rlhf.py.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from gemma_grpo.data.bundled import bundled_rows, is_bundled
from gemma_grpo.data.chat import BOS_ID, check_alternation, fold_system, open_model_turn_ids, reply_ids, turn_ids
from gemma_grpo.data.forms import PROMPTS, Form, form_of
from gemma_grpo.data.hh_rlhf import (
    FIRST,
    LoadedPairs,
    alternates,
    check_text,
    content_hash,
    message_turns,
    no_usable_row,
    parse_pairs,
    prompt_turns,
    row_columns,
    row_source,
)
from gemma_grpo.data.rejections import Rejections, UnusableRowError
from gemma_grpo.data.sources import DataError, Rows, RowSource, open_rows
from gemma_grpo.types import Message, PreferencePair, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A row of a prompt dataset before it meets a tokenizer."""

    source: str
    messages: tuple[Message, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadedPrompts:
    """Usable rows of a prompt dataset: rows = number of prompts + sum of dropped."""

    prompts: tuple[PromptRow, ...]
    rows: int
    dropped: Mapping[str, int]
    """Reason -> rows: not_a_prompt, not_text, empty_prompt, roles_do_not_alternate, last_turn_not_user."""
    examples: tuple[str, ...] = ()
    """Where the first three rows of each reason stand: "path:line: reason"."""
    form: str = ""
    """What the rows were read as, a name of forms.FORMS; empty for rows that came as PromptRow."""
    numbers: tuple[int, ...] = ()
    """Each prompt's row: its line in a file of lines, else counted from 1."""

    @property
    def kept(self) -> int:
        """Number of usable rows."""
        return len(self.prompts)


@dataclass(frozen=True, slots=True)
class BuiltPrompts:
    """Prompts ready to sample from: rows = number of prompts + sum of dropped."""

    prompts: tuple[Prompt, ...]
    rows: int
    dropped: Mapping[str, int]
    """Reason -> rows: duplicate_prompt, prompt_too_long."""
    shortened: int
    """Prompts that lost their oldest turns to the token limit."""


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A preference pair as the reward is trained on it; the replies end as a finished rollout does."""

    pair: PreferencePair
    conversation_id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EncodedPairs:
    """Pairs as token ids: rows = number of pairs + sum of dropped."""

    pairs: tuple[EncodedPair, ...]
    rows: int
    dropped: Mapping[str, int]
    """Reason -> rows: pair_too_long."""
    shortened: int
    """Pairs whose conversation lost its oldest turns to the token limit."""


@dataclass(frozen=True, slots=True)
class FittedDialogue:
    """The end of a conversation that fits a token limit."""

    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    """<bos> and the open model turn included."""


def load_dataset_rows(source: RowSource, *, name: str | None = None, strict: bool = False) -> LoadedPairs | LoadedPrompts:
    """Rows of any source, or of "bundled:NAME": pairs if they have two replies in one of the forms of docs/data.md, else prompts.

    The first 100 rows decide. Raises DataError, also when no row is usable, and with `strict` for the first that is not.
    """
    first, opened = open_rows(bundled_rows(source) if is_bundled(source) else source).peek(FIRST)
    form = form_of(first)
    are_pairs = (form is not None and form.of_pairs) or any(isinstance(row, PreferencePair) for row in first)
    parse = parse_pairs if are_pairs else parse_prompts
    loaded: LoadedPairs | LoadedPrompts = parse(opened, name=name, strict=strict)
    if not loaded.kept:
        raise DataError(no_usable_row(opened.place, first, loaded.rows, loaded.dropped, form=form))
    return loaded


def parse_prompts(rows: Rows | Iterable[Any], *, name: str | None = None, strict: bool = False) -> LoadedPrompts:
    """Rows of a prompt dataset: `prompt` is text, a transcript or role/content messages; `messages` loses its final reply.

    Whatever a row holds, it becomes a prompt or is counted under a reason (with `strict`: DataError); further columns are kept for
    the rewards.
    """
    first, opened = (rows if isinstance(rows, Rows) else open_rows(rows)).peek(FIRST)
    found = form_of(first)
    form = found if found and not found.of_pairs else PROMPTS
    prompts: list[PromptRow] = []
    numbers: list[int] = []
    rejections = Rejections(opened, strict=strict)
    for number, row in opened.numbered:
        try:
            prompts.append(row if isinstance(row, PromptRow) else _parse_prompt(row, form, opened.name, name))
            numbers.append(number)
        except UnusableRowError as why:
            rejections.add(number, why)
    counts = rejections.counts
    told = form.name if found or not all(isinstance(row, PromptRow) for row in first) else ""
    return LoadedPrompts(tuple(prompts), len(prompts) + counts.total(), dict(counts), tuple(rejections.examples), told, tuple(numbers))


def build_prompts(items: Iterable[PreferencePair | PromptRow], tokenizer: PreTrainedTokenizerBase, max_prompt_length: int) -> BuiltPrompts:
    """Prompts of at most max_prompt_length tokens, in the items' order, each conversation once.

    A conversation over the limit loses whole turns from the left; one whose last user turn alone is over it is dropped. Columns are
    the row's own, and "chosen" is the preferred reply of a pair.
    """
    prompts: dict[str, Prompt] = {}
    dropped: Counter[str] = Counter()
    shortened = 0
    for item in items:
        fitted = fit_dialogue(tokenizer, item.messages, max_prompt_length)
        if fitted is None:
            dropped["prompt_too_long"] += 1
            continue
        prompt = _prompt(item, fitted)
        if prompt.prompt_id in prompts:
            dropped["duplicate_prompt"] += 1
            continue
        prompts[prompt.prompt_id] = prompt
        shortened += len(prompt.messages) < len(item.messages)
    return BuiltPrompts(tuple(prompts.values()), len(prompts) + dropped.total(), dict(dropped), shortened)


def encode_pairs(
    pairs: Iterable[PreferencePair], tokenizer: PreTrainedTokenizerBase, max_length: int, *, reserved: int = 0
) -> EncodedPairs:
    """Pairs whose conversation, longer reply and `reserved` further tokens (the judge's question) fit into max_length.

    The conversation loses whole turns from the left, the same for both sides; a reply never loses a token. A pair whose last user
    turn and reply alone are over the limit is dropped and counted.
    """
    encoded: list[EncodedPair] = []
    dropped: Counter[str] = Counter()
    shortened = 0
    for pair in pairs:
        chosen, rejected = (tuple(reply_ids(tokenizer, reply)) for reply in (pair.chosen, pair.rejected))
        fitted = fit_dialogue(tokenizer, pair.messages, max_length - reserved - max(len(chosen), len(rejected)))
        if fitted is None:
            dropped["pair_too_long"] += 1
            continue
        shortened += len(fitted.messages) < len(pair.messages)
        encoded.append(EncodedPair(pair, conversation_id(pair.messages), fitted.token_ids, chosen, rejected))
    return EncodedPairs(tuple(encoded), len(encoded) + dropped.total(), dict(dropped), shortened)


def fit_dialogue(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], limit: int) -> FittedDialogue | None:
    """The longest end of a conversation that is at most `limit` tokens long.

    It starts with a user turn; no turn is ever cut. A system message stays, in front of the first turn that is left. None when even
    the last user turn is too long.
    """
    system, turns = (messages[:1], messages[1:]) if messages and messages[0]["role"] == "system" else ((), messages)
    check_alternation(turns)
    after = [open_model_turn_ids(tokenizer)]  # of what follows the turn at `start`, the last part first
    length, longest = 1 + len(after[0]), None
    # from the right, and no further than fits: each turn is tokenised once, however many there are
    for start in range(len(turns) - 1, -1, -2):
        plain = turn_ids(tokenizer, turns[start])
        opening = turn_ids(tokenizer, *fold_system((*system, turns[start]))) if system else plain
        if length + len(opening) <= limit:
            longest = start, opening, len(after)
        after += [plain, turn_ids(tokenizer, turns[start - 1]) if start else []]
        length += len(after[-1]) + len(after[-2])
        if length > limit:
            break
    if longest is None:
        return None
    start, opening, count = longest
    return FittedDialogue((*system, *turns[start:]), tuple(chain([BOS_ID], opening, *reversed(after[:count]))))


def conversation_id(messages: Sequence[Message]) -> str:
    """16 hex digits of the SHA-256 of the first user turn, case and spacing aside: one id for every depth of a conversation."""
    first = next((message["content"] for message in messages if message["role"] == "user"), "")
    return hashlib.sha256(" ".join(first.casefold().split()).encode()).hexdigest()[:16]


def is_held_out(conversation_id: str, holdout: float) -> bool:
    """Whether a conversation belongs to the held-out share. A larger share contains every smaller one."""
    return _place(conversation_id, "holdout") < holdout


def part_of_conversation(conversation_id: str, parts: int) -> int:
    """Which of so many equal parts, 0 to parts - 1, a conversation belongs to."""
    return int(_place(conversation_id, "part") * parts)


def is_for_witness(conversation_id: str, share: float) -> bool:
    """Whether a conversation of the training side teaches the witness, and so nobody whom the witness watches."""
    return _place(conversation_id, "witness") < share


def _place(conversation_id: str, salt: str) -> float:
    """A number in [0, 1) that depends on the conversation and the salt alone."""
    return float(int(hashlib.sha256(f"{salt} {conversation_id}".encode()).hexdigest()[:13], 16) / 16**13)


def split_by_conversation(items: Iterable[Item], key: Callable[[Item], str], holdout: float) -> tuple[list[Item], list[Item]]:
    """(train, held out), each in the given order; `key` names an item's conversation, and no conversation is on both sides."""
    train: list[Item] = []
    held_out: list[Item] = []
    for item in items:
        (held_out if is_held_out(key(item), holdout) else train).append(item)
    return train, held_out


def order(prompts: Iterable[Prompt], seed: int, epoch: int) -> list[Prompt]:
    """The prompts in the order of one epoch: a permutation that depends on seed, epoch and the prompts, not on how they came."""
    return sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed} {epoch} {prompt.prompt_id}".encode()).digest())


def _prompt(item: PreferencePair | PromptRow, fitted: FittedDialogue) -> Prompt:
    columns = {**item.columns, "chosen": item.chosen} if isinstance(item, PreferencePair) else dict(item.columns)
    return Prompt(
        prompt_id=content_hash(fitted.messages),
        source=item.source,
        messages=fitted.messages,
        token_ids=fitted.token_ids,
        # of the whole conversation: its first turn may be among those that did not fit
        conversation_id=conversation_id(item.messages),
        columns=columns,
    )


def _parse_prompt(row: Any, form: Form, fallback_name: str, name: str | None) -> PromptRow:
    if isinstance(row, Mapping):
        row = form.read(row)
    if not _has(row, "prompt") and not _has(row, "messages"):
        raise UnusableRowError("not_a_prompt")
    column = "prompt" if _has(row, "prompt") else "messages"
    turns = _turns(row[column], cut_reply=column == "messages")
    check_text(turns)
    if not alternates(turns):
        raise UnusableRowError("roles_do_not_alternate")
    if turns[-1]["role"] != "user":
        raise UnusableRowError("last_turn_not_user")
    if not turns[-1]["content"]:
        raise UnusableRowError("empty_prompt")
    return PromptRow(row_source(row, fallback_name, name), tuple(turns), row_columns(row, (column,)))


def _turns(value: Any, *, cut_reply: bool) -> list[Message]:
    turns = message_turns(value) if cut_reply else prompt_turns(value)
    if not turns:
        raise UnusableRowError("not_a_prompt")
    open_reply = isinstance(value, str) and turns[-1] == {"role": "assistant", "content": ""}
    if len(turns) > 1 and turns[-1]["role"] == "assistant" and (cut_reply or open_reply):
        turns.pop()
    return turns


def _has(row: Any, *columns: str) -> bool:
    return isinstance(row, Mapping) and all(row.get(column) is not None for column in columns)
