"""Every form gives the pair that is worked out by hand here, says its name, and counts what it cannot use under its own reason."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from preference_forms import ASK, BAD, FORM_CLASSES, GOOD, ONE_PAIR, USER, said, told

from gemma_grpo.data.forms import FORMS, form_of
from gemma_grpo.data.hh_rlhf import LoadedPairs, load_hh_rlhf, parse_pairs
from gemma_grpo.data.inspection import pair_stats
from gemma_grpo.data.prompts import LoadedPrompts, load_dataset_rows
from gemma_grpo.data.rejections import REASONS
from gemma_grpo.data.sources import DataError

CASES = [(name, rows) for name, cases in ONE_PAIR.items() if name != "common beginning" for rows in cases]


@pytest.mark.parametrize(("name", "rows"), CASES, ids=[f"{name} {n}" for n, (name, _) in enumerate(CASES)])
def test_each_form_is_seen_by_its_columns_and_read_as_the_same_pair(name: str, rows: list[dict[str, Any]]) -> None:
    loaded = load_dataset_rows(rows)
    assert isinstance(loaded, LoadedPairs)
    assert (loaded.form, loaded.kept, loaded.rows, loaded.merged) == (name, 1, len(rows), len(rows) - 1)
    (pair,) = loaded.pairs
    assert (pair.messages, pair.chosen, pair.rejected) == ((USER,), GOOD, BAD)
    assert pair.pair_id == parse_pairs(ONE_PAIR["transcripts"][0]).pairs[0].pair_id
    assert pair_stats(loaded)["form"] == name


def test_texts_that_begin_alike_part_at_a_white_space() -> None:
    (pair,) = parse_pairs([{"chosen": "The sky is blue.", "rejected": "The sky is black."}]).pairs
    assert (pair.messages[0]["content"], pair.chosen, pair.rejected) == ("The sky is", "blue.", "black.")
    reasons = {
        "no_common_prompt": {"chosen": "Blue.", "rejected": "Black."},
        "unknown_turns": {side: f"### Human: hi\n### Assistant: {side}" for side in ("chosen", "rejected")},
        "empty_final_reply": {"chosen": "The sky is blue.", "rejected": "The sky is "},
    }
    for reason, row in reasons.items():
        assert {name for name, count in parse_pairs([row]).dropped.items() if count} == {reason}


def test_where_a_prompt_ends_is_not_guessed_beside_rows_that_say_it() -> None:
    plain = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    loaded = parse_pairs([plain, plain, ONE_PAIR["transcripts"][0][0]])
    assert (loaded.form, loaded.kept, loaded.dropped["not_a_pair"]) == ("transcripts", 1, 2)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_a_guessed_prompt_and_its_reply_are_the_text_again(prompt: str, chosen: str, rejected: str) -> None:
    row = {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"}
    for pair in parse_pairs([row]).pairs if form_of([row]) is FORMS["common beginning"] else ():
        ask = pair.messages[0]["content"]
        assert "".join((ask + pair.chosen).split()) == "".join(row["chosen"].split())
        assert "".join((ask + pair.rejected).split()) == "".join(row["rejected"].split())


def test_an_instruction_has_its_input_system_and_history_before_the_replies() -> None:
    row = {
        **{"instruction": "Translate.", "input": "Haus", "system": "Be brief.", "history": [["Hi", "Hello"]], "topic": "words"},
        **{"chosen": "house", "rejected": "home"},
    }
    (pair,) = parse_pairs([row]).pairs
    assert pair.messages == (said("Be brief.", "system"), said("Hi", "user"), said("Hello"), said("Translate.\n\nHaus", "user"))
    assert pair.columns == {"topic": "words"}


def test_a_shared_conversation_loses_the_end_that_the_replies_replace() -> None:
    talk = [told("Be kind.", "system"), told("Hi", "human"), told("Hello"), told(ASK, "human"), told("It is 3.")]
    (pair,) = parse_pairs([{"conversations": talk, "chosen": told(GOOD), "rejected": told(BAD), "id": 7}]).pairs
    assert [message["content"] for message in pair.messages] == ["Be kind.", "Hi", "Hello", ASK]
    assert (pair.chosen, pair.rejected, pair.columns) == (GOOD, BAD, {"id": 7})


def test_of_scored_completions_the_first_best_stands_against_the_first_worst_and_the_scores_stay() -> None:
    scores = [(GOOD, 9), ("four", 9), (BAD, 1), ("six", 1)]
    row = {"instruction": ASK, "source": "flan", "completions": [{"response": text, "overall_score": score} for text, score in scores]}
    (pair,) = parse_pairs([row]).pairs
    assert (pair.chosen, pair.rejected, pair.source) == (GOOD, BAD, "flan")
    assert pair.columns == {"score_chosen": 9.0, "score_rejected": 1.0}


@pytest.mark.parametrize("name", FORM_CLASSES)
def test_what_a_form_cannot_use_is_counted_under_its_reason_and_named_when_strict(name: str) -> None:
    row, reason = FORM_CLASSES[name]
    loaded = parse_pairs([row])
    assert (loaded.kept, {key for key, count in loaded.dropped.items() if count}) == (0, {reason})
    with pytest.raises(DataError) as refused:
        parse_pairs([row], strict=True)
    assert str(refused.value).startswith(f"the given rows, row 1: {reason} ({REASONS[reason]}). ")


def test_labels_are_paired_in_order_and_the_rest_is_counted() -> None:
    def row(prompt: str, text: str, label: bool) -> dict[str, Any]:
        return {"prompt": prompt, "completion": text, "label": label, "n": text}

    rows = [
        row("p", "good 1", True),
        row("p", "good 2", True),
        row("q", "bad", False),
        row("p", "bad 1", False),
        row("p", "good 3", True),
        row("p", "bad 2", False),
        row("r", "bad", False),
    ]
    loaded = parse_pairs(rows)
    assert [(pair.chosen, pair.rejected) for pair in loaded.pairs] == [("good 1", "bad 1"), ("good 2", "bad 2")]
    assert loaded.numbers == (4, 6)
    assert loaded.pairs[0].columns == {"n": "bad 1"}
    # 7 rows: 2 pairs, 2 merged into them, q's, r's and p's third good one left over
    assert (loaded.rows, loaded.kept, loaded.merged, loaded.dropped["no_counterpart"]) == (7, 2, 2, 3)
    assert loaded.examples == tuple(f"the given rows, row {n}: no_counterpart" for n in (3, 5, 7))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("pqr"), st.booleans()), max_size=20))
def test_every_labelled_row_is_in_one_pair_or_counted(given_rows: list[tuple[str, bool]]) -> None:
    rows = [{"prompt": prompt, "completion": f"reply {n}", "label": label} for n, (prompt, label) in enumerate(given_rows)]
    loaded = parse_pairs(rows)
    most = sum(min(given_rows.count((prompt, True)), given_rows.count((prompt, False))) for prompt in "pqr")
    assert loaded.kept == loaded.merged == most
    assert loaded.rows == len(rows) == 2 * most + sum(loaded.dropped.values())
    used = [text for pair in loaded.pairs for text in (pair.chosen, pair.rejected)]
    assert len(set(used)) == len(used)


ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=5), st.sampled_from([ASK, GOOD, "user", "gpt"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "from", "value", "response", "score"]), inner, max_size=3),
    ),
    max_leaves=8,
)
COLUMNS = sorted({*itertools.chain.from_iterable(row for _, rows in CASES for row in rows), "history", "rejected_response", "ratings"})


@example(next(case for case in CASES if case[0] == "scored completions"), [{"chosen": None, "completions": 1}])
@settings(max_examples=500, deadline=None)
@given(st.sampled_from(CASES), st.lists(st.dictionaries(st.sampled_from(COLUMNS), ANY, max_size=6), max_size=4))
def test_whatever_else_a_source_holds_its_rows_are_used_or_counted(
    case: tuple[str, list[dict[str, Any]]], others: list[dict[str, Any]]
) -> None:
    loaded = parse_pairs([*case[1], *others])
    assert loaded.rows == len(case[1]) + len(others) == loaded.kept + loaded.merged + sum(loaded.dropped.values())
    assert all(pair.chosen and pair.rejected and pair.messages[-1]["role"] == "user" for pair in loaded.pairs)
    assert len(loaded.numbers) == loaded.kept


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(CASES), st.dictionaries(st.sampled_from(COLUMNS), ANY, max_size=4))
def test_no_change_to_a_row_raises(case: tuple[str, list[dict[str, Any]]], change: dict[str, Any]) -> None:
    loaded = parse_pairs([{**row, **change} for row in case[1]])
    assert loaded.rows == len(case[1])


def test_columns_that_fit_no_form_are_listed_with_the_nearest_one() -> None:
    with pytest.raises(DataError) as refused:
        load_hh_rlhf([{"prompt": ASK, "choosen": GOOD, "rejected": BAD}] * 2)
    text = str(refused.value)
    assert "none of 2 rows is usable (not_a_pair 2); columns found: prompt, choosen, rejected" in text
    with pytest.raises(DataError) as refused:
        load_dataset_rows([{"promt": ASK, "choosen": GOOD, "rejected": BAD}] * 2)
    text = str(refused.value)
    assert "Nearest is prompt, chosen, rejected: prompt is missing (is it promt?); chosen is missing (is it choosen?). " in text
    assert all(form.columns in text for form in FORMS.values())


def test_rows_of_odd_names_are_counted_and_named_in_short() -> None:
    loaded = parse_pairs([{"prompt": {1: "a", "b": 2}, "completion": GOOD, "label": label} for label in (True, False)])
    assert (loaded.merged, loaded.dropped["not_a_pair"]) == (1, 1)  # paired, and then no conversation
    with pytest.raises(DataError) as refused:
        load_dataset_rows([{f"{n} {'x' * 10**5}": 1 for n in range(500)}])
    assert len(str(refused.value)) < 3000


@pytest.mark.parametrize("piece", ["\n", "\n\n ", "# ", "<|a", "\r\n", "\n\nHuman"])
def test_plain_texts_are_parted_in_linear_time(piece: str) -> None:
    def seconds(size: int) -> float:
        row = {side: piece * (size // len(piece)) + f" {side}" for side in ("chosen", "rejected")}
        started = time.process_time()
        parse_pairs([row])
        return time.process_time() - started

    small, large = (min(seconds(size) for _ in range(2)) for size in (2**13, 2**16))
    assert large < 24 * max(small, 1e-3)  # 8 times the text; quadratic work takes 64 times as long


def test_single_replies_and_red_team_transcripts_are_told_apart_from_pairs() -> None:
    with pytest.raises(DataError, match="a preference needs a better and a worse one, or a label"):
        load_dataset_rows([{"instruction": ASK, "input": "", "output": GOOD}])
    with pytest.raises(DataError, match="red-team transcripts: single conversations with a rating"):
        load_dataset_rows([{"transcript": "\n\nHuman: x", "min_harmlessness_score_transcript": -1.0, "rating": 4.0}])


def test_prompts_alone_are_prompts_in_each_of_their_forms() -> None:
    for name, row in {
        "prompts": {"prompt": ASK, "answer": "4"},
        "messages": {"messages": [USER, said(GOOD)], "answer": "4"},
        "ShareGPT prompts": {"conversations": [told(ASK, "human"), told(GOOD)], "answer": "4"},
    }.items():
        loaded = load_dataset_rows([row])
        assert isinstance(loaded, LoadedPrompts)
        assert (loaded.form, loaded.numbers) == (name, (1,))
        assert loaded.prompts[0].messages == (USER,)
        assert loaded.prompts[0].columns == {"answer": "4"}


def test_forms_survive_json() -> None:
    for _, rows in CASES:
        again = json.loads(json.dumps(rows))
        assert parse_pairs(again).pairs == parse_pairs(rows).pairs
