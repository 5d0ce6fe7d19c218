"""Text that comes token by token: never taken back, never half a character, and all of it in the end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from gemma_grpo.data.chat import reply_text
from gemma_grpo.data.pieces import GrowingText

FIRST = 107
"""Id behind Gemma's control tokens."""


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Spells as Gemma does: words with a mark for the space, and a token for each byte of what is no word."""
    words = [*(f"<unused{n}>" for n in range(FIRST)), *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "b", "é", "▁€"]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


GEMMA_LIKE = byte_fallback_tokenizer()


def streamed(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> tuple[list[str], str]:
    """What was shown after each token, and what each is said to have brought."""
    text = GrowingText(tokenizer)
    shown = [text.add(token) for token in ids]
    shown.append(text.end())
    assert len(text.pieces) == len(ids)
    assert "".join(text.pieces) == "".join(shown)
    return shown, "".join(shown)


@given(st.lists(st.integers(FIRST, len(GEMMA_LIKE) - 1), max_size=12))
def test_any_tokens_of_bytes_and_words_are_in_the_end_what_the_engine_decodes(ids: list[int]) -> None:
    assert streamed(GEMMA_LIKE, ids)[1] == reply_text(GEMMA_LIKE, ids)


@given(ids=st.lists(st.integers(107, 362), max_size=12))
def test_any_bytes_are_in_the_end_what_the_engine_decodes(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> None:
    assert streamed(tokenizer, ids)[1] == reply_text(tokenizer, ids)


def test_a_character_comes_with_its_last_byte(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [*tokenizer.encode("a€b", add_special_tokens=False), 106]
    assert streamed(tokenizer, ids)[0] == ["a", "", "", "€", "b", "", ""]


def test_a_run_of_byte_tokens_waits_until_nothing_can_spoil_it() -> None:
    euro, wrong, word = [FIRST + byte for byte in "€".encode()], FIRST + 0xFF, len(GEMMA_LIKE) - 4
    assert streamed(GEMMA_LIKE, [word, *euro, word])[0] == [" a", "", "", "", "€ a", ""]
    # with one wrong byte Gemma's decoder gives up the whole run: the euro must not have been shown
    assert streamed(GEMMA_LIKE, [*euro, wrong, word])[0] == ["", "", "", "", "\ufffd" * 4 + " a", ""]


@pytest.mark.parametrize("stop", [[], [106]])
def test_half_a_character_at_the_end_is_shown_as_what_it_is(tokenizer: PreTrainedTokenizerFast, stop: list[int]) -> None:
    half = tokenizer.encode("€", add_special_tokens=False)[:2]
    shown, text = streamed(tokenizer, [*half, *stop])
    assert text == reply_text(tokenizer, [*half, *stop]) == "\ufffd"
    assert shown[-1] == ("" if stop else "\ufffd")


def test_nothing_said_is_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert GrowingText(tokenizer).end() == ""
    assert not GrowingText(tokenizer).stopped
