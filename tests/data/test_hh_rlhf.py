from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gemma_grpo import load_hh_rlhf
from gemma_grpo.data.hh_rlhf import DataError, parse_pairs, transcript_turns
from gemma_grpo.types import PreferencePair

HH_RLHF = Path(os.environ.get("HH_RLHF_DIR") or Path(__file__).parents[3] / "shared" / "data" / "hh-rlhf")
CONTEXT = "\n\nHuman: Hi\n\nAssistant: Hello. \n\nSecond paragraph.\n\nHuman: How are you?"
GOOD = {"chosen": f"{CONTEXT}\n\nAssistant: Fine, thanks.", "rejected": f"{CONTEXT}\n\nAssistant: Go away."}
MESSAGES = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello. \n\nSecond paragraph."},
    {"role": "user", "content": "How are you?"},
)
CLEAN = {"empty_final_reply": 0, "prompts_differ": 0, "roles_do_not_alternate": 0}


def reason(row) -> str:
    loaded = parse_pairs([row])
    assert loaded.kept == 0
    return next(name for name, count in loaded.dropped.items() if count)


def real_file(name: str) -> Path:
    if not (HH_RLHF / name).is_file():
        pytest.skip(f"no {name}: set HH_RLHF_DIR to the folder of real hh-rlhf rows")
    return HH_RLHF / name


@pytest.mark.parametrize(
    ("name", "rows", "kept", "dropped"),
    [("harmless-base", 1700, 1692, (3, 3, 2)), ("helpful-base", 1681, 1666, (4, 7, 4))],
)
def test_real_rows_give_the_known_counts(name, rows, kept, dropped):
    loaded = load_hh_rlhf(real_file(f"{name}.dev.jsonl.gz"))
    assert (loaded.rows, loaded.kept) == (rows, kept)
    assert loaded.dropped == dict(zip(CLEAN, dropped, strict=True))
    assert {pair.source for pair in loaded.pairs} == {name}
    assert len({pair.pair_id for pair in loaded.pairs}) == kept


def test_a_transcript_becomes_the_turns_before_the_last_and_two_replies():
    (pair,) = parse_pairs([GOOD]).pairs
    assert pair.messages == MESSAGES
    assert (pair.chosen, pair.rejected) == ("Fine, thanks.", "Go away.")


def test_labels_without_the_blank_line_before_them_are_text():
    turns = transcript_turns("\n\nHuman: a\nAssistant: b Human: c\n\nAssistant: d\n\nhuman: e")
    assert [turn["content"] for turn in turns] == ["a\nAssistant: b Human: c", "d\n\nhuman: e"]


def test_a_transcript_that_lost_its_first_blank_line_is_read_all_the_same():
    assert parse_pairs([{side: text.strip() for side, text in GOOD.items()}]).pairs == parse_pairs([GOOD]).pairs


REPLY = [{"role": "assistant", "content": "Fine, thanks."}], [{"role": "assistant", "content": "Go away."}]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [*MESSAGES, *REPLY[0]], "rejected": [*MESSAGES, *REPLY[1]]},
        {"prompt": list(MESSAGES), "chosen": REPLY[0], "rejected": REPLY[1]},
        {"prompt": list(MESSAGES), "chosen": "Fine, thanks.", "rejected": " Go away.\n"},
        {"prompt": "How are you?", "chosen": [*MESSAGES, *REPLY[0]], "rejected": [*MESSAGES, *REPLY[1]]},
        {"prompt": f"{CONTEXT}\n\nAssistant:", "chosen": " Fine, thanks.", "rejected": " Go away."},
        {"prompt": CONTEXT, **GOOD},
    ],
    ids=["implicit", "explicit", "explicit messages, text replies", "prompt beside whole sides", "transcript prompt", "transcripts"],
)
def test_all_forms_of_one_pair_are_the_same_pair(row):
    assert parse_pairs([row]).pairs == parse_pairs([GOOD]).pairs


def test_a_plain_text_prompt_is_one_user_turn():
    (pair,) = parse_pairs([{"prompt": "What is 2+2?", "chosen": "4", "rejected": "5"}]).pairs
    assert pair.messages == ({"role": "user", "content": "What is 2+2?"},)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen": f"{CONTEXT}\n\nAssistant: ", "rejected": GOOD["rejected"]}, "empty_final_reply"),
        ({"chosen": "\n\nHuman: other\n\nAssistant:", "rejected": GOOD["rejected"]}, "empty_final_reply"),
        ({"chosen": "\n\nHuman: other\n\nAssistant: x", "rejected": GOOD["rejected"]}, "prompts_differ"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", "rejected": "\n\nHuman: a\n\nAssistant: d"}, "prompts_differ"),
        ({side: f"\n\nHuman: a\n\nAssistant: b\n\nAssistant: {side}" for side in GOOD}, "roles_do_not_alternate"),
        ({side: f"\n\nAssistant: {side}" for side in GOOD}, "roles_do_not_alternate"),
        ({side: f"\n\nHuman: {side}" for side in GOOD}, "last_turn_not_assistant"),
        ({side: f"\n\nHuman: \n\nAssistant: {side}" for side in GOOD}, "empty_prompt"),
        ({side: [{"role": "system", "content": "s"}, {"role": "assistant", "content": side}] for side in GOOD}, "roles_do_not_alternate"),
        ({side: f"{side}, not begun alike" for side in GOOD}, "no_common_prompt"),
        ({"chosen": GOOD["chosen"]}, "not_a_pair"),
        ({"chosen": 3, "rejected": None}, "not_a_pair"),
        ({"chosen": [], "rejected": []}, "not_a_pair"),
        ({"chosen": [{"role": "tool", "content": "x"}], "rejected": [{"role": "tool", "content": "y"}]}, "not_a_pair"),
        ({side: f"{CONTEXT}\n\nAssistant: half of a pair \ud83d {side}" for side in GOOD}, "not_text"),
        ("text", "not_a_pair"),
        (None, "not_a_pair"),
    ],
)
def test_an_unusable_row_counts_under_the_first_reason_that_applies(row, expected):
    assert reason(row) == expected


def test_further_columns_are_kept_and_the_source_is_the_argument_the_column_or_the_file(tmp_path):
    path = tmp_path / "mixed.jsonl.gz"
    rows = [{**GOOD, "source": "red", "answer": [1, {"x": None}]}, GOOD]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    first, second = load_hh_rlhf(path).pairs
    assert (first.source, second.source) == ("red", "mixed")
    assert first.columns == {"answer": [1, {"x": None}]}
    assert {pair.source for pair in load_hh_rlhf(path, name="mine").pairs} == {"mine"}


def test_pairs_pass_through_unchanged():
    pair = PreferencePair("id", "world", MESSAGES, "a", "b", {"kind": "greeting"})
    assert load_hh_rlhf([pair]).pairs == (pair,)


def test_the_id_depends_on_content_alone():
    same, other = {**GOOD, "source": "x", "n": 1}, {"chosen": GOOD["rejected"], "rejected": GOOD["chosen"]}
    ids = [parse_pairs([row]).pairs[0].pair_id for row in (GOOD, same, other)]
    assert ids[0] == ids[1] != ids[2]


def test_data_of_which_nothing_is_left_says_why_and_what_was_expected():
    with pytest.raises(DataError, match=r"none of 2 rows is usable \(not_a_pair 2\); columns found: question, answer. Nearest is "):
        load_hh_rlhf([{"question": "a", "answer": "b"}] * 2)
    with pytest.raises(DataError, match="rows of type str, int"):
        load_hh_rlhf(["a", 3])
    with pytest.raises(DataError, match="empty_final_reply 1"):
        load_hh_rlhf([dict.fromkeys(GOOD, f"{CONTEXT}\n\nAssistant:")])


def test_data_without_rows_says_so(tmp_path):
    path = tmp_path / "blank.jsonl"
    path.write_text("\n\n \n")
    with pytest.raises(DataError, match=r"blank.jsonl holds no rows"):
        load_hh_rlhf(path)
    with pytest.raises(DataError, match="the given rows holds no rows"):
        load_hh_rlhf([])


TRANSCRIPT = st.lists(
    st.one_of(
        st.sampled_from(["\n\nHuman:", "\n\nAssistant:", "\n\nHuman: a", "\n\nAssistant: b", " ", "\n", "Human:", "\ud800", "\0", "x"]),
        st.text(max_size=5),
    ),
    max_size=8,
).map("".join)
TURNS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=4)}),
        st.dictionaries(st.sampled_from(["role", "content"]), st.one_of(st.none(), st.integers(), st.text(max_size=4), st.just([]))),
        st.text(max_size=3),
        st.none(),
    ),
    max_size=6,
)
VALUE = st.one_of(TRANSCRIPT, TURNS, st.none(), st.booleans(), st.floats(), st.binary(max_size=3), st.dictionaries(st.text(), st.none()))
ROW = st.one_of(
    st.fixed_dictionaries({"chosen": TRANSCRIPT, "rejected": TRANSCRIPT}),
    st.dictionaries(st.sampled_from(["chosen", "rejected", "prompt", "source", "extra"]), VALUE),
    VALUE,
)


@settings(max_examples=500, deadline=None)
@given(st.lists(ROW, max_size=6), st.integers(0, 6))
def test_whatever_rows_hold_they_are_used_or_counted(rows, where):
    rows.insert(where, GOOD)
    loaded = load_hh_rlhf(rows)
    assert loaded.rows == len(rows) == loaded.kept + sum(loaded.dropped.values())
    assert set(CLEAN) <= set(loaded.dropped)
    assert all(isinstance(pair, PreferencePair) and pair.chosen and pair.rejected for pair in loaded.pairs)
    assert all(pair.messages[-1]["role"] == "user" for pair in loaded.pairs)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), min_size=1, max_size=5).filter(lambda texts: len(texts) % 2),
    st.text(min_size=1, max_size=12),
    st.text(min_size=1, max_size=12),
)
def test_a_written_transcript_reads_back(texts, chosen, rejected):
    everything = [*texts, chosen, rejected]
    assume(chosen.strip() and rejected.strip() and texts[-1].strip())
    assume(not any("Human:" in text or "Assistant:" in text for text in everything))
    context = "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(texts))
    (pair,) = parse_pairs([{"chosen": f"{context}\n\nAssistant: {chosen}", "rejected": f"{context}\n\nAssistant: {rejected}"}]).pairs
    assert [message["content"] for message in pair.messages] == [text.strip() for text in texts]
    assert (pair.chosen, pair.rejected) == (chosen.strip(), rejected.strip())
