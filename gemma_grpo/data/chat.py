"""Gemma's turns: the only file that knows the template, <bos> and the stop ids.

The template is written out here and never taken from a checkpoint: a checkpoint's Jinja is code of a stranger.
It equals Gemma 3's own for text: system text folded into the first user turn, roles user and model, turns trimmed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemma_grpo.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD_ID, EOS_ID, BOS_ID = 0, 1, 2
START_OF_TURN_ID, END_OF_TURN_ID = 105, 106
STOP_IDS = (EOS_ID, END_OF_TURN_ID)
"""Either token ends a reply. Gemma's instruct models stop with <end_of_turn>; its base models with <eos>."""

CONTROL_IDS = frozenset((PAD_ID, *STOP_IDS, BOS_ID, START_OF_TURN_ID))

_TURN_NAME = {"user": "user", "assistant": "model"}


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of text in which control tokens mean nothing: "<end_of_turn>" typed by a user stays nine characters of text."""
    ids = list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
    if CONTROL_IDS.isdisjoint(ids):
        return ids
    # a tokenizer whose file does not mark them as special finds them in text all the same: parted after "<" they are text
    parts = re.split("(?<=<)", text)
    return [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True)]


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """The conversation with a leading system message put in front of the first user turn, as Gemma's own template does."""
    turns = list(messages)
    if turns and turns[0]["role"] == "system":
        if len(turns) < 2 or turns[1]["role"] != "user":
            raise ValueError("a system message must be followed by a user message: Gemma has no system turn of its own.")
        turns[:2] = [{"role": "user", "content": f"{turns[0]['content'].strip()}\n\n{turns[1]['content'].strip()}"}]
    return turns


def check_alternation(messages: Sequence[Message]) -> None:
    """Raise ValueError unless roles run user, assistant, user, ... and end with the user."""
    for index, message in enumerate(messages):
        expected = "user" if index % 2 == 0 else "assistant"
        if message["role"] != expected:
            raise ValueError(f"message {index} has role {message['role']!r}, expected {expected!r}: Gemma's turns alternate, user first.")
    if len(messages) % 2 == 0:
        raise ValueError("a prompt must end with a user message.")


def turn_ids(tokenizer: PreTrainedTokenizerBase, message: Message) -> list[int]:
    """`<start_of_turn>role\\ncontent<end_of_turn>\\n` as token ids."""
    body = encode_plain(tokenizer, f"{_TURN_NAME[message['role']]}\n{message['content'].strip()}")
    return [START_OF_TURN_ID, *body, END_OF_TURN_ID, *encode_plain(tokenizer, "\n")]


def open_model_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`<start_of_turn>model\\n`: what a reply is sampled after."""
    return [START_OF_TURN_ID, *encode_plain(tokenizer, "model\n")]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation with the model turn left open; exactly one <bos>, at the start.

    Raises ValueError when the roles do not alternate or the last turn is not the user's.
    """
    turns = fold_system(messages)
    check_alternation(turns)
    ids = [BOS_ID]
    for message in turns:
        ids += turn_ids(tokenizer, message)
    return ids + open_model_turn_ids(tokenizer)


def reply_ids(tokenizer: PreTrainedTokenizerBase, reply: str) -> list[int]:
    """Token ids of a finished reply, ending with <end_of_turn> exactly as a rollout that stopped does."""
    return [*encode_plain(tokenizer, reply.strip()), END_OF_TURN_ID]


def reply_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Text of a completion without its stop token; other control tokens the model emitted stay visible."""
    ids = list(token_ids)
    if ids and ids[-1] in STOP_IDS:
        ids.pop()
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def judge_suffix_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """What follows a reply to ask for a verdict: a newline, one more user turn with the question, and an open model turn.

    It comes after the rollout's own last token: a reply cut off by the length limit is shown to the judge unfinished.
    """
    question_turn = turn_ids(tokenizer, {"role": "user", "content": question})
    return [*encode_plain(tokenizer, "\n"), *question_turn, *open_model_turn_ids(tokenizer)]


def comparison_ids(tokenizer: PreTrainedTokenizerBase, first: str, second: str, rubric: str | None = None) -> list[int]:
    """What follows an open model turn to ask which of two replies is better: the turn's end, a user turn with both, and an open model turn.

    Turn markers in the replies are plain text.
    """
    told = "" if rubric is None else f"{rubric.strip()}\n\n"
    question = f"Reply A:\n{first.strip()}\n\nReply B:\n{second.strip()}\n\n{told}Which reply is better? Answer A or B."
    opening = [*encode_plain(tokenizer, "Show me two replies."), END_OF_TURN_ID, *encode_plain(tokenizer, "\n")]
    return [*opening, *turn_ids(tokenizer, {"role": "user", "content": question}), *open_model_turn_ids(tokenizer)]
