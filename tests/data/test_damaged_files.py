"""Files that are not what their name says, break off, or unpack to more than memory holds: the whole text of every error."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_grpo.data.hh_rlhf import load_hh_rlhf
from gemma_grpo.data.json_files import MAX_DEPTH, MAX_JSON_BYTES, MAX_LINE_BYTES
from gemma_grpo.data.sources import DataError, open_rows

MEBI = 2**20
ROWS = [{"n": index} for index in range(50)]
CUT = "The file may be cut off: download it again, or mend this line."


def jsonl(rows: list[dict[str, int]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def values(path: Path) -> list[object]:
    return [row for _, row in open_rows(path).numbered]


def refusal(path: Path) -> str:
    """The DataError's text after the path."""
    with pytest.raises(DataError) as refused:
        values(path)
    return str(refused.value).removeprefix(str(path))


# ---- lines that stop the reading


def nested(levels: int, inner: str = "1") -> bytes:
    return (f'{{"chosen": {"[" * (levels - 1)}{inner}{"]" * (levels - 1)}}}').encode()


STOPPING = {
    "cut off": (b'{"chosen": "a', f"not JSON (Unterminated string starting at). {CUT}"),
    "no JSON": (b"chosen: a", f"not JSON (Expecting value). {CUT}"),
    "single quotes": (b"{'chosen': 'a'}", f"not JSON (Expecting property name enclosed in double quotes). {CUT}"),
    "a comma too many": (b'{"chosen": 1,}', f"not JSON (Expecting property name enclosed in double quotes). {CUT}"),
    "two rows on a line": (b"{} {}", f"not JSON (Extra data). {CUT}"),
    "lines that end in CR": (b'{"n": 1}\r{"n": 2}', f"not JSON (Extra data). {CUT}"),
    "a control character": (b'{"chosen": "a\tb"}', f"not JSON (Invalid control character at). {CUT}"),
    "a raw NUL": (b'{"chosen": "a\0"}', f"not JSON (Invalid control character at). {CUT}"),
    "zeros of a crash": (b"\0" * 100, f"not JSON (Expecting value). {CUT}"),
    "not UTF-8": (b'{"chosen": "\xff"}', "not UTF-8 text (invalid start byte at byte 12). Save the file as UTF-8."),
    "a surrogate as bytes": (b'{"a": "\xed\xa0\x80"}', "not UTF-8 text (invalid continuation byte at byte 7). Save the file as UTF-8."),
    "UTF-16": ('{"n": 1}'.encode("utf-16"), "not UTF-8 text (invalid start byte at byte 0). Save the file as UTF-8."),
    "a key twice": (b'{"chosen": "a", "chosen": "b"}', "the key 'chosen' is given twice in one object. Keep one."),
    "a key twice inside": (b'{"n": [{"\\u001b[2J": 1, "\\u001b[2J": 1}]}', "the key '\\x1b[2J' is given twice in one object. Keep one."),
    "an endless number": (b"9" * 5000, "not JSON ("),
    "deep": (nested(MAX_DEPTH + 1), "nested deeper than 100 levels. A row is an object of texts or lists of messages: flatten it."),
    "bottomless": (b"[" * 200_000, "nested deeper than 100 levels. A row is an object of texts or lists of messages: flatten it."),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", STOPPING)
def test_a_line_that_is_no_row_stops_the_reading_with_its_number(tmp_path: Path, name: str, packed: bool) -> None:
    line, message = STOPPING[name]
    content = jsonl(ROWS[:20]) + b"\n" + line + b"\n" + jsonl(ROWS[20:])  # the 22nd line, after a blank one
    path = write(tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl"), gzip.compress(content) if packed else content)
    assert refusal(path).startswith(f":22: {message}")


def test_what_is_as_deep_as_may_be_is_read_and_brackets_in_text_do_not_count(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", nested(MAX_DEPTH) + b"\n" + json.dumps({"chosen": "[{" * 500}).encode())
    first, second = values(path)
    assert json.dumps(first).encode() == nested(MAX_DEPTH)
    assert second == {"chosen": "[{" * 500}


def test_numbers_that_are_none_are_read_as_they_stand(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b'{"a": NaN, "b": -Infinity, "c": 1e400}')
    assert str(values(path)) == "[{'a': nan, 'b': -inf, 'c': inf}]"


# ---- gzip


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


PACKED = gzip.compress(jsonl(ROWS))
"""The last 8 bytes are the CRC and the length."""


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (PACKED[:-1], 50),  # the length is cut
        (PACKED[:-8], 50),
        (flipped(PACKED, len(PACKED) - 8), 50),  # the CRC is wrong
        (flipped(PACKED, len(PACKED) - 4), 50),  # the length is wrong
        (PACKED[:12], 0),
        (PACKED[:10] + b"\xff" * 40, 0),
        (PACKED + PACKED[:-1], 100),  # the second member is cut
        (PACKED + b"something else", 50),
    ],
    ids=["length cut", "end cut", "crc", "length", "head alone", "no deflate", "second member cut", "something after it"],
)
def test_gzip_data_that_break_off_say_after_which_line(tmp_path: Path, content: bytes, line: int) -> None:
    path = write(tmp_path / "rows.jsonl.gz", content)
    assert refusal(path) == f": the gzip data breaks off or is damaged after line {line}. Download it again."
    with pytest.raises(DataError, match="the gzip data breaks off"):  # and never counts as a shorter file
        load_hh_rlhf(path)


def test_several_gzip_members_and_zeros_after_them_are_one_file(tmp_path: Path) -> None:
    halves = jsonl(ROWS)[:123], jsonl(ROWS)[123:]  # in the middle of a line
    path = write(tmp_path / "rows.jsonl.gz", b"".join(map(gzip.compress, halves)) + b"\0" * 512)
    assert values(path) == ROWS


# ---- bombs


def bomb(mebibytes: int, text: bytes) -> bytes:
    """A gzip file of a thousandth of what it unpacks to: one member over and over."""
    return gzip.compress(text * (MEBI // len(text))) * mebibytes


BOMBS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "one line": (
        "rows.jsonl.gz",
        lambda: gzip.compress(b"{}\n") + bomb(400, b"a"),
        ":2: a line of more than 16 MiB. A .jsonl file has one row a line: write it so, or cut the row.",
    ),
    "one list": (
        "rows.json.gz",
        lambda: bomb(1000, b" "),
        ": more than 256 MiB of JSON, which would be read whole. Write one object a line to a .jsonl file, which is read line by line.",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_zip_bomb_is_refused_before_memory_is_gone(tmp_path: Path, name: str) -> None:
    file, content, message = BOMBS[name]
    path = write(tmp_path / file, content())
    assert path.stat().st_size < 2 * MEBI
    script = (
        "import resource, sys\n"
        "from gemma_grpo.data.sources import DataError, open_rows\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: list(open_rows(sys.argv[1]).numbered)\n"
        "except DataError as error: print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120, check=True)
    refused, mebibytes = done.stdout.splitlines()
    assert refused == f"{path}{message}"
    limit = (MAX_LINE_BYTES if name == "one line" else MAX_JSON_BYTES) // MEBI
    assert int(mebibytes) < 2 * limit + 16


def test_a_line_just_within_the_limit_is_read(tmp_path: Path) -> None:
    row = b'{"n": "' + b"x" * (MAX_LINE_BYTES - 10) + b'"}'
    assert len(row) + 1 == MAX_LINE_BYTES
    assert len(values(write(tmp_path / "rows.jsonl", row + b"\n"))) == 1
    assert refusal(write(tmp_path / "rows.jsonl", row + b" \n")).startswith(":1: a line of more than 16 MiB")


# ---- something else under the name of data

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGES = [b"<!DOCTYPE html>\n<html>", b"\n  <HTML lang=en>", b"\xef\xbb\xbf<!doctype HTML PUBLIC"]


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz", "rows.parquet"])
def test_what_was_saved_in_the_place_of_data_is_called_by_its_name(tmp_path: Path, file: str) -> None:
    path = write(tmp_path / file, POINTER)
    assert refusal(path) == " is a Git LFS pointer, not the data. Run `git lfs pull` in its repository."
    for page in PAGES:
        assert refusal(write(path, page)) == (
            " is a web page (HTML), not the data: what a browser or curl saves where a login is needed. Download it again, logged in."
        )


def test_a_name_that_disagrees_with_the_compression_is_said(tmp_path: Path) -> None:
    plain = write(tmp_path / "rows.jsonl", PACKED)
    assert refusal(plain) == " is gzip-compressed but not named .gz. Rename it to rows.jsonl.gz."
    packed = write(tmp_path / "rows.jsonl.gz", jsonl(ROWS))
    assert refusal(packed) == " is named .gz but is not gzip-compressed. Rename it without .gz, or download it again."
