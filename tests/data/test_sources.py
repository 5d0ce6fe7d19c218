from __future__ import annotations

import gzip
import json
import os
import sys

import datasets
import pytest

from gemma_grpo.data.sources import DataError, open_rows

ROWS = [{"prompt": "one\u2028line", "n": 1}, {"prompt": "zwei ü", "n": 2}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def write(path, content: str | bytes):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(source) -> list:
    return [row for _, row in open_rows(source).numbered]


def read_error(source) -> str:
    with pytest.raises(DataError) as caught:
        rows(source)
    return str(caught.value)


def test_every_format_gives_the_same_rows(tmp_path):
    parquet = tmp_path / "d.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(parquet)
    sources = [
        write(tmp_path / "a.jsonl", LINES),
        str(write(tmp_path / "b.jsonl.gz", gzip.compress(LINES.encode()))),
        write(tmp_path / "c.json", json.dumps(ROWS)),
        write(tmp_path / "c.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        parquet,
        ROWS,
        tuple(ROWS),
        (row for row in ROWS),
        datasets.Dataset.from_list(ROWS),
        datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS[:1]), "train": datasets.Dataset.from_list(ROWS)}),
    ]
    assert all(rows(source) == ROWS for source in sources)


@pytest.mark.parametrize(
    "content",
    ["\ufeff" + LINES, LINES.replace("\n", "\r\n"), "\n\n" + LINES.replace("\n", "\n\n  \n"), LINES.rstrip("\n")],
    ids=["bom", "crlf", "blank lines", "no newline at the end"],
)
def test_line_ends_marks_and_blank_lines_do_not_matter(tmp_path, content):
    assert rows(write(tmp_path / "a.jsonl", content)) == ROWS


@pytest.mark.parametrize(
    ("name", "expected"),
    [("harmless-base.dev.jsonl.gz", "harmless-base"), ("rows.jsonl", "rows"), (".jsonl", "dataset")],
)
def test_the_source_is_named_after_its_file(tmp_path, name, expected):
    content = gzip.compress(b"{}\n") if name.endswith(".gz") else b"{}\n"
    assert open_rows(write(tmp_path / name, content)).name == expected


def test_a_missing_file_names_the_nearest_ones(tmp_path):
    write(tmp_path / "harmless-base.dev.jsonl", LINES)
    write(tmp_path / "notes.txt", "x")
    message = read_error(tmp_path / "harmles-base.dev.jsonl")
    assert "no such file" in message
    assert f"Nearest: {tmp_path / 'harmless-base.dev.jsonl'}" in message


def test_a_mistyped_path_in_an_existing_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "harmless.jsonl", LINES)
    assert "no such file. Nearest: data/harmless.jsonl" in read_error("data/harmles")
    assert "no such file" in read_error("nowhere/rows.jsonl")
    assert "owner/name" in read_error("imdb")


def test_a_file_wins_over_a_hub_id_of_the_same_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner" / "rows.jsonl", LINES)
    assert rows("owner/rows.jsonl") == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"is empty \(0 bytes\)"),
        ("a.jsonl", POINTER, "git lfs pull"),
        ("a.jsonl.gz", POINTER, "git lfs pull"),
        ("a.parquet", POINTER, "git lfs pull"),
        ("a.jsonl.gz", LINES.encode(), "is not gzip"),
        ("a.jsonl.gz", gzip.compress(LINES.encode() * 100, mtime=0)[:-20], "breaks off or is damaged"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:12], "breaks off or is damaged after line 0"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-8] + b"\0" * 8, "breaks off or is damaged after line 2"),
        ("a.json.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "breaks off or is damaged"),
        ("a.jsonl", LINES + '{"prompt": "cut of', r"a.jsonl:3: not JSON \(Unterminated string"),
        ("a.jsonl", LINES.encode() + b'{"prompt": "\xff"}\n', "a.jsonl:3: not UTF-8"),
        ("a.jsonl", "[" * 200_000, "a.jsonl:1: nested deeper than 100 levels"),
        pytest.param(
            *("a.jsonl", "9" * 5000, "a.jsonl:1: not JSON"),
            marks=pytest.mark.skipif(not hasattr(sys, "get_int_max_str_digits"), reason="this Python reads numbers of any length"),
        ),
        ("a.json", LINES, "not JSON"),
        ("a.json", '{"rows": []}', "holds dict, expected a list"),
        ("a.parquet", b"PAR1 and then nothing of the kind", "not a readable parquet file"),
        ("a.txt", "chosen,rejected\n", r"unknown kind of file. Known are .jsonl"),
    ],
)
def test_broken_files_say_what_where_and_how_to_mend(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        rows(path)
    assert str(path) in str(caught.value)


def test_a_folder_names_the_files_in_it(tmp_path):
    write(tmp_path / "a.jsonl", LINES)
    assert "is a folder. It holds a.jsonl" in read_error(tmp_path)
    (tmp_path / "none").mkdir()
    assert "is a folder. Give a file" in read_error(tmp_path / "none")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_says_so(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES)
    path.chmod(0)
    assert "cannot be read" in read_error(path)


@pytest.mark.parametrize("source", ["", "x" * 5000, "a\0b.jsonl", "~nobody-such/rows.jsonl", 3, None])
def test_nonsense_sources_are_data_errors(source):
    assert read_error(source)


def test_several_splits_without_a_train_split_are_named():
    one = datasets.Dataset.from_list(ROWS)
    assert rows(datasets.DatasetDict({"test": one})) == ROWS
    assert "no split named train (found: a, b)" in read_error({"a": one, "b": one})
