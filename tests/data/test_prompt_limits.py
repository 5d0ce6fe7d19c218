"""A prompt over the limit loses whole turns from the left, or is dropped and counted; and what a long conversation costs."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from gemma_grpo.data.chat import BOS_ID, END_OF_TURN_ID, START_OF_TURN_ID, open_model_turn_ids, prompt_ids
from gemma_grpo.data.prompts import PromptRow, build_prompts, fit_dialogue
from gemma_grpo.types import Message

CONTENT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
TALK = st.tuples(st.booleans(), st.lists(CONTENT, min_size=1, max_size=9).filter(lambda texts: len(texts) % 2))


def conversation(system: bool, texts: list[str]) -> tuple[Message, ...]:
    turns: list[Message] = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    return tuple([{"role": "system", "content": "be brief"}, *turns] if system else turns)


@settings(max_examples=500, deadline=None)
@given(TALK, st.integers(8, 260))
def test_a_prompt_over_the_limit_keeps_bos_its_last_user_turn_and_the_open_reply(
    tokenizer: PreTrainedTokenizerFast, talk: tuple[bool, list[str]], limit: int
) -> None:
    messages = conversation(*talk)
    head, turns = messages[: talk[0]], messages[talk[0] :]
    built = build_prompts([PromptRow("test", messages)], tokenizer, limit)
    whole, least = (len(prompt_ids(tokenizer, (*head, *some))) for some in (turns, turns[-1:]))
    assert (len(built.prompts), built.dropped) == ((1, {}) if least <= limit else (0, {"prompt_too_long": 1}))
    assert built.shortened == (least <= limit < whole)
    for prompt in built.prompts:
        kept = prompt.messages[len(head) :]
        assert prompt.messages[: len(head)] == head
        assert kept == turns[-len(kept) :]  # whole turns, from the right
        assert [kept[0]["role"], kept[-1]["role"]] == ["user", "user"]
        ids = list(prompt.token_ids)
        assert ids == prompt_ids(tokenizer, prompt.messages)
        assert len(ids) <= limit
        opened = open_model_turn_ids(tokenizer)
        assert (ids[0], ids.count(BOS_ID), ids[-len(opened) :]) == (BOS_ID, 1, opened)
        assert (ids.count(START_OF_TURN_ID), ids.count(END_OF_TURN_ID)) == (len(kept) + 1, len(kept))
        more = (*head, *turns[-len(kept) - 2 :])  # as much as fits: two turns more would not
        assert len(kept) == len(turns) or len(prompt_ids(tokenizer, more)) > limit


class CountingTokenizer:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.characters = tokenizer, 0

    def encode(self, text: str, **options: Any) -> list[int]:
        self.characters += len(text)
        return list(self.tokenizer.encode(text, **options))


def test_a_conversation_of_very_many_turns_costs_what_is_kept_of_it(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = conversation(True, ["a question or a reply"] * 20_001)
    counting = CountingTokenizer(tokenizer)
    fitted = fit_dialogue(counting, messages, 500)  # type: ignore[arg-type]
    assert fitted is not None
    assert len(fitted.token_ids) <= 500
    assert counting.characters < 3 * 500  # a byte is a token here: what is kept, its folded first turn and the first that is too much
