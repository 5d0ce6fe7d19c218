"""The laws of reliability/fuzz_parser.py on 2,000 generated inputs and on the fuzzer's corpus; and that no text takes quadratic time."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_grpo.data.hh_rlhf import message_turns, parse_pairs, transcript_turns
from reliability.fuzz_parser import check, read_file, read_gzip, read_messages, read_rows, read_transcript, rendered, seeds, stripped

MARKERS = ["\n\nHuman:", "\n\nAssistant:", "\r\n\r\nHuman:", "Human:", "Assistant:"]
BETWEEN = ["\n", "\n\n", "\r\n", " ", "\ud800", "\0", "\u2028", "x"]
TRANSCRIPT = st.lists(st.one_of(st.sampled_from([*MARKERS, *BETWEEN]), st.text(max_size=5)), max_size=12).map("".join)
LEAF = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), TRANSCRIPT)
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": LEAF}),
    st.dictionaries(st.sampled_from(["role", "content", "name"]), LEAF, max_size=3),
)
SIDE = st.one_of(LEAF, st.lists(MESSAGE, max_size=5), st.dictionaries(st.text(max_size=3), LEAF, max_size=2))
COLUMNS = ["chosen", "rejected", "prompt", "messages", "source", "n"]
ROW = st.one_of(st.dictionaries(st.sampled_from(COLUMNS), SIDE, max_size=6), st.recursive(LEAF, st.lists, max_leaves=5))
LINE = st.one_of(
    ROW.map(lambda row: json.dumps(row).encode()),
    st.binary(max_size=12),
    st.sampled_from([b"", b" \r", b"\xef\xbb\xbf{}", b'{"a": 1, "a": 2}', b"NaN", b"[" * 300, b'"\\ud800"', b"\x0c[]\x0b", b"1\r2"]),
)
FILE = st.lists(LINE, max_size=6).map(b"\n".join)


@settings(max_examples=600, deadline=None)
@given(TRANSCRIPT)
def test_a_transcript_that_is_accepted_renders_to_itself(text: str) -> None:
    read_transcript(text.encode("utf-8", "surrogatepass"))


@settings(max_examples=300, deadline=None)
@given(st.lists(MESSAGE, max_size=5))
def test_messages_are_read_whole_or_not_at_all(value: list[object]) -> None:
    read_messages(json.dumps(value).encode())


@settings(max_examples=500, deadline=None)
@given(st.lists(ROW, max_size=5))
def test_every_row_is_used_or_counted_and_strict_reading_stops_at_the_first(rows: list[object]) -> None:
    read_rows(json.dumps(rows).encode())


@settings(max_examples=400, deadline=None)
@given(FILE)
def test_a_file_gives_its_lines_or_an_error_that_names_it(content: bytes) -> None:
    read_file(content)


@settings(max_examples=200, deadline=None)
@given(FILE.map(gzip.compress), st.data())
def test_a_damaged_gzip_file_gives_its_lines_or_an_error_that_names_it(content: bytes, data: st.DataObject) -> None:
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(0, 3), "changes")):
        changed[data.draw(st.integers(2, len(changed) - 1), "place")] = data.draw(st.integers(0, 255), "value")
    read_gzip(bytes(changed[: data.draw(st.integers(3, len(changed)), "length")]))


def test_the_fuzzers_corpus_keeps_the_laws() -> None:
    corpus = list(seeds())
    assert {data[0] for data in corpus} == {0, 1, 2, 3, 4}
    for data in corpus:
        check(data)


def test_the_laws_own_oracle_by_hand() -> None:
    text = "Human:  a\nAssistant: b \r\n\r\nAssistant:\tc \n\nHuman:"
    turns = transcript_turns(text)
    assert turns == [
        {"role": "user", "content": "a\nAssistant: b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": ""},
    ]
    assert rendered(turns) == stripped(text) == "\n\nHuman: a\nAssistant: b\n\nAssistant: c\n\nHuman: "


# ---- time: the work of twice as much text is about twice as much


def pair_of(text: str) -> dict[str, str]:
    return {side: f"{text}\n\nAssistant: {side}" for side in ("chosen", "rejected")}


SHAPES: dict[str, Callable[[int], object]] = {
    "newlines": lambda n: transcript_turns("\n\nHuman:" + "\n" * n),
    "blank lines of CRLF": lambda n: transcript_turns("\n\nHuman:" + "\r\n" * (n // 2)),
    "white space before the first label": lambda n: transcript_turns(" \n" * (n // 2) + "Human: a"),
    "labels that are none": lambda n: transcript_turns("\n\nHuman" * (n // 7)),
    "short turns": lambda n: transcript_turns("\n\nHuman:\n\nAssistant:" * (n // 20)),
    "short messages": lambda n: message_turns([{"role": "user", "content": "a"}] * (n // 10)),
    "a pair of one turn": lambda n: parse_pairs([pair_of("\n\nHuman: " + "a" * n)]),
    "a pair of short turns": lambda n: parse_pairs([pair_of("\n\nHuman: a\n\nAssistant: b" * (n // 25) + "\n\nHuman: c")]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_megabyte_is_read_in_linear_time(shape: str) -> None:
    def seconds(size: int) -> float:
        started = time.process_time()
        SHAPES[shape](size)
        return time.process_time() - started

    # 16 times the text: linear work takes 16 times as long, quadratic work 256 times
    small, large = (min(seconds(size) for _ in range(3)) for size in (2**16, 2**20))
    assert large < 80 * max(small, 1e-4)
