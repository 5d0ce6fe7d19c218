from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_grpo.data.chat import prompt_ids
from gemma_grpo.data.hh_rlhf import DataError, LoadedPairs
from gemma_grpo.data.prompts import (
    LoadedPrompts,
    PromptRow,
    build_prompts,
    conversation_id,
    encode_pairs,
    fit_dialogue,
    is_held_out,
    load_dataset_rows,
    order,
    parse_prompts,
    split_by_conversation,
)
from gemma_grpo.types import PreferencePair, Prompt

# A user turn of n bytes is n + 8 tokens (start, "user\n", content, end, "\n"), a model turn n + 9; <bos> and the open turn are 1 + 7.
TALK = (
    {"role": "user", "content": "a" * 10},  # 18 tokens
    {"role": "assistant", "content": "b" * 10},  # 19
    {"role": "user", "content": "c" * 5},  # 13
    {"role": "assistant", "content": "d" * 20},  # 29
    {"role": "user", "content": "e" * 3},  # 11
)
WHOLE = 8 + 18 + 19 + 13 + 29 + 11


def row(*messages: dict, **columns) -> PromptRow:
    return PromptRow("test", messages or TALK, columns)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def reason(raw) -> str:
    loaded = parse_prompts([raw])
    assert loaded.kept == 0
    return next(iter(loaded.dropped))


@pytest.mark.parametrize(
    ("limit", "turns", "tokens"),
    [(WHOLE, 5, WHOLE), (WHOLE - 1, 3, 8 + 13 + 29 + 11), (60, 1, 19), (19, 1, 19)],
    ids=["all of it", "one token short", "the middle does not fit", "the last turn alone"],
)
def test_a_conversation_over_the_limit_loses_whole_turns_from_the_left(tokenizer, limit, turns, tokens):
    fitted = fit_dialogue(tokenizer, TALK, limit)
    assert fitted.messages == TALK[-turns:]
    assert list(fitted.token_ids) == prompt_ids(tokenizer, TALK[-turns:])
    assert len(fitted.token_ids) == tokens


def test_a_last_turn_over_the_limit_does_not_fit(tokenizer):
    assert fit_dialogue(tokenizer, TALK, 18) is None
    assert fit_dialogue(tokenizer, TALK, -5) is None


def test_a_system_message_stays_in_front_of_what_is_left(tokenizer):
    system = {"role": "system", "content": "s"}
    fitted = fit_dialogue(tokenizer, (system, *TALK), 30)
    assert fitted.messages == (system, TALK[-1])
    assert list(fitted.token_ids) == prompt_ids(tokenizer, [user("s\n\neee")])


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=7).filter(lambda lengths: len(lengths) % 2), st.integers(0, 150))
def test_what_fits_is_the_longest_end_that_starts_with_a_user_turn(tokenizer, lengths, limit):
    messages = tuple({"role": ("user", "assistant")[i % 2], "content": "x" * n} for i, n in enumerate(lengths))
    fitting = [start for start in range(0, len(messages), 2) if len(prompt_ids(tokenizer, messages[start:])) <= limit]
    fitted = fit_dialogue(tokenizer, messages, limit)
    assert (fitted.messages if fitted else None) == (messages[fitting[0] :] if fitting else None)


def test_built_prompts_count_what_was_shortened_dropped_and_doubled(tokenizer):
    items = [row(), row(user("short")), row(user("x" * 60)), row(user("short"), extra=1), row(*TALK, mark="again")]
    built = build_prompts(items, tokenizer, 61)
    assert [len(prompt.messages) for prompt in built.prompts] == [3, 1]
    assert built.dropped == {"prompt_too_long": 1, "duplicate_prompt": 2}
    assert (built.rows, built.shortened) == (5, 1)


def test_a_shortened_prompt_still_belongs_to_its_whole_conversation(tokenizer):
    (prompt,) = build_prompts([row()], tokenizer, 20).prompts
    assert prompt.messages == TALK[-1:]
    assert prompt.conversation_id == conversation_id(TALK) != conversation_id(prompt.messages)


def test_a_pair_becomes_a_prompt_that_carries_its_preferred_reply(tokenizer):
    pair = PreferencePair("id", "harmless-base", TALK, "good", "bad", {"kind": "how-to"})
    (prompt,) = build_prompts([pair], tokenizer, 512).prompts
    assert prompt.columns == {"kind": "how-to", "chosen": "good"}
    assert prompt.source == "harmless-base"
    assert list(prompt.token_ids) == prompt_ids(tokenizer, TALK)


def test_an_encoded_pair_leaves_room_for_its_longer_reply_and_the_question(tokenizer):
    pair = PreferencePair("id", "test", TALK, "yes", "n" * 9, {})  # replies of 4 and 10 tokens, their end included
    whole = encode_pairs([pair], tokenizer, WHOLE + 10 + 7, reserved=7)
    assert (len(whole.pairs[0].prompt_ids), whole.shortened) == (WHOLE, 0)
    short = encode_pairs([pair], tokenizer, WHOLE + 10 + 6, reserved=7)
    assert (len(short.pairs[0].prompt_ids), short.shortened) == (61, 1)
    assert short.pairs[0].conversation_id == conversation_id(TALK)
    assert [ids[-1] for ids in (short.pairs[0].chosen_ids, short.pairs[0].rejected_ids)] == [106, 106]
    none = encode_pairs([pair, pair], tokenizer, 19 + 10 + 6, reserved=7)
    assert (none.pairs, none.rows, none.dropped) == ((), 2, {"pair_too_long": 2})


def test_depth_case_and_spacing_do_not_change_the_conversation():
    assert conversation_id(TALK) == conversation_id(TALK[:1])
    assert conversation_id([user(" Hello\n World ")]) == conversation_id([{"role": "system", "content": "s"}, user("hello world")])
    assert conversation_id([user("hello world")]) != conversation_id([user("helloworld")])


@given(st.lists(st.tuples(st.text(max_size=3), st.integers()), max_size=40), st.floats(0.01, 0.99))
def test_no_conversation_crosses_the_split_and_nothing_is_lost(items, holdout):
    train, held_out = split_by_conversation(items, lambda item: conversation_id([user(item[0])]), holdout)
    assert sorted(train + held_out) == sorted(items)
    assert not {conversation_id([user(text)]) for text, _ in train} & {conversation_id([user(text)]) for text, _ in held_out}


def test_the_split_takes_its_share_and_a_larger_share_contains_the_smaller():
    ids = [conversation_id([user(str(n))]) for n in range(4000)]
    small, large = ({i for i in ids if is_held_out(i, share)} for share in (0.1, 0.3))
    assert small < large
    assert len(small) == pytest.approx(400, abs=4 * 19)  # four standard deviations of a binomial
    assert not any(is_held_out(i, 0.0) for i in ids)
    assert all(is_held_out(i, 1.0) for i in ids)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{n}", "test", (), (), "c") for n in range(count)]


def test_the_order_is_a_permutation_fixed_by_seed_and_epoch_alone():
    some = prompts(50)
    first = order(some, seed=1, epoch=0)
    assert sorted(first, key=id) == sorted(some, key=id)
    assert order(reversed(some), seed=1, epoch=0) == first
    assert len({tuple(p.prompt_id for p in order(some, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_every_place_is_equally_likely():
    places = [[p.prompt_id for p in order(prompts(4), seed, 0)].index("p0") for seed in range(2000)]
    assert [places.count(place) for place in range(4)] == [pytest.approx(500, abs=4 * 19.4)] * 4


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": " Hi\n"},
        {"prompt": [user("Hi ")]},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:"},
        {"prompt": "\n\nHuman: Hi"},
        {"messages": [user("Hi"), {"role": "assistant", "content": "Hello"}]},
        {"messages": [user("Hi")]},
    ],
)
def test_every_form_of_a_prompt_is_the_same_prompt(raw):
    (prompt,) = parse_prompts([raw]).prompts
    assert prompt.messages == (user("Hi"),)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"text": "Hi"}, "not_a_prompt"),
        ({"prompt": 3}, "not_a_prompt"),
        ({"prompt": []}, "not_a_prompt"),
        ({"messages": "Hi"}, "not_a_prompt"),
        ("Hi", "not_a_prompt"),
        ({"prompt": "  "}, "empty_prompt"),
        ({"prompt": "\ud800"}, "not_text"),
        ({"prompt": [user("a"), user("b")]}, "roles_do_not_alternate"),
        ({"prompt": [{"role": "assistant", "content": "a"}, user("b")]}, "roles_do_not_alternate"),
        ({"prompt": [user("a"), {"role": "assistant", "content": "b"}]}, "last_turn_not_user"),
        ({"prompt": [{"role": "system", "content": "a"}]}, "last_turn_not_user"),
    ],
)
def test_an_unusable_prompt_counts_under_its_reason(raw, expected):
    assert reason(raw) == expected


def test_further_columns_reach_the_prompt(tokenizer):
    loaded = load_dataset_rows([{"prompt": "Hi", "answer": 4, "source": "sums"}], name=None)
    (prompt,) = build_prompts(loaded.prompts, tokenizer, 64).prompts
    assert (prompt.columns, prompt.source) == ({"answer": 4}, "sums")


def test_rows_with_both_replies_are_pairs_and_others_prompts(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "chosen": "a", "rejected": "b"}) + '\n{"prompt": "Ho"}\n')
    pairs = load_dataset_rows(path)
    assert isinstance(pairs, LoadedPairs)
    assert (pairs.rows, pairs.kept, pairs.dropped["not_a_pair"]) == (2, 1, 1)
    assert pairs.pairs[0].source == "mine"
    prompts_only = load_dataset_rows([{"prompt": "Hi", "chosen": None}, {"prompt": "Ho"}], name="other")
    assert isinstance(prompts_only, LoadedPrompts)
    assert [prompt.source for prompt in prompts_only.prompts] == ["other", "other"]


def test_rows_that_are_neither_name_the_columns_found_and_expected():
    with pytest.raises(
        DataError, match=r"none of 1 rows is usable \(not_a_prompt 1\); columns found: text. Nearest is .* Known forms: .* prompt"
    ):
        load_dataset_rows([{"text": "Hi"}])


GARBAGE = st.one_of(
    st.none(), st.integers(), st.text(max_size=4), st.lists(st.dictionaries(st.sampled_from(["role", "content"]), st.text()))
)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(GARBAGE, st.dictionaries(st.sampled_from(["prompt", "messages", "source", "x"]), GARBAGE)), max_size=6))
def test_whatever_prompt_rows_hold_they_are_used_or_counted(tokenizer, rows):
    loaded = load_dataset_rows([{"prompt": "Hi"}, *rows])
    assert loaded.rows == len(rows) + 1 == loaded.kept + sum(loaded.dropped.values())
    built = build_prompts(loaded.prompts, tokenizer, 40)
    assert built.rows == loaded.kept == len(built.prompts) + sum(built.dropped.values())
    assert all(len(prompt.token_ids) <= 40 for prompt in built.prompts)
