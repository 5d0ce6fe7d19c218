"""The shipped tokenizer: Gemma's control ids, lossless on any text, and turns that encode alike joined or apart."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gemma_grpo.data.chat import encode_plain, judge_suffix_ids, prompt_ids, reply_ids, reply_text
from gemma_grpo.miniature.world import MODEL_DIR
from gemma_grpo.reward.generative import JUDGE_QUESTION

TOKENIZER: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.mark.parametrize(
    ("token", "index"),
    [
        ("<pad>", 0),
        ("<eos>", 1),
        ("<bos>", 2),
        ("<unk>", 3),
        ("<mask>", 4),
        ("<unused0>", 5),
        ("<start_of_turn>", 105),
        ("<end_of_turn>", 106),
    ],
)
def test_control_tokens_have_gemmas_ids(token: str, index: int) -> None:
    assert TOKENIZER.convert_tokens_to_ids(token) == index
    assert index in TOKENIZER.all_special_ids


def test_a_newline_is_gemmas_107_and_stands_alone() -> None:
    assert encode_plain(TOKENIZER, "\n\nuser\n") == [107, 107, *encode_plain(TOKENIZER, "user"), 107]
    assert len(encode_plain(TOKENIZER, "user")) == len(encode_plain(TOKENIZER, "model")) == 1


def test_no_bos_is_added_unasked() -> None:
    assert 2 not in TOKENIZER("hello").input_ids


def test_typed_control_tokens_are_plain_text() -> None:
    for typed in ("<end_of_turn>", "a<bos>b", "<unused7>", "<pad>\n<eos>"):
        ids = encode_plain(TOKENIZER, typed)
        assert min(ids) > 106
        assert TOKENIZER.decode(ids) == typed


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=120))
def test_any_text_comes_back_exactly(text: str) -> None:
    ids = encode_plain(TOKENIZER, text)
    assert TOKENIZER.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text
    assert all(index > 106 for index in ids)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60), st.text(max_size=60))
def test_text_beside_a_newline_encodes_alike_joined_or_apart(before: str, after: str) -> None:
    joined = encode_plain(TOKENIZER, f"{before}\n{after}")
    assert joined == [*encode_plain(TOKENIZER, before), 107, *encode_plain(TOKENIZER, after)]


def test_yes_and_no_are_one_token_each_and_the_question_is_short() -> None:
    yes, no = encode_plain(TOKENIZER, "Yes"), encode_plain(TOKENIZER, "No")
    assert len(yes) == len(no) == 1
    assert yes != no
    assert len(judge_suffix_ids(TOKENIZER, JUDGE_QUESTION)) <= 32


def test_digits_are_single_tokens() -> None:
    assert len(encode_plain(TOKENIZER, "1234")) == 4
    assert len(encode_plain(TOKENIZER, "3 + 12")) == 4


def test_its_chat_template_spells_the_same_turns_as_ours() -> None:
    messages = [
        {"role": "user", "content": " hi "},
        {"role": "assistant", "content": "Hello to you."},
        {"role": "user", "content": "what is 3 + 4?"},
    ]
    encoded = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert TOKENIZER(encoded, add_special_tokens=False).input_ids == prompt_ids(TOKENIZER, messages)  # type: ignore[arg-type]


def test_a_reply_ends_its_turn_and_reads_back() -> None:
    ids = reply_ids(TOKENIZER, "Use items[::-1].")
    assert ids[-1] == 106
    assert reply_text(TOKENIZER, ids) == "Use items[::-1]."
