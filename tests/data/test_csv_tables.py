"""CSV and TSV: what a row is, where it stands, and what stops the reading, with its line."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_grpo.cli import run
from gemma_grpo.data import tables
from gemma_grpo.data.hh_rlhf import LoadedPairs
from gemma_grpo.data.prompts import LoadedPrompts, load_dataset_rows
from gemma_grpo.data.sources import DataError, open_rows

HEADER = "prompt,chosen,rejected"
CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def numbered(path: Path) -> list[tuple[int, object]]:
    return list(open_rows(path).numbered)


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as refused:
        numbered(path)
    return str(refused.value).removeprefix(str(path))


def test_rows_have_the_line_they_begin_on_and_quotes_may_hold_line_breaks(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", f'{HEADER}\n"a\n\nb, ""c""",yes,no\n\nd,"y\n",n\n')
    assert numbered(path) == [
        (2, {"prompt": 'a\n\nb, "c"', "chosen": "yes", "rejected": "no"}),
        (6, {"prompt": "d", "chosen": "y\n", "rejected": "n"}),
    ]


@pytest.mark.parametrize("delimiter", tables.DELIMITERS)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_delimiter_line_end_and_mark_gives_the_same_rows(tmp_path: Path, delimiter: str, ending: str, mark: str) -> None:
    text = ending.join([delimiter.join(HEADER.split(",")), delimiter.join(['"What, or who; a|b?"', '"x\ty"', "no"])])
    path = write(tmp_path / "d.csv", mark + text)
    assert numbered(path) == [(2, {"prompt": "What, or who; a|b?", "chosen": "x\ty", "rejected": "no"})]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(CELL, min_size=3, max_size=3), max_size=5), st.sampled_from(tables.DELIMITERS))
def test_what_pythons_writer_wrote_reads_back(tmp_path_factory: pytest.TempPathFactory, cells: list[list[str]], delimiter: str) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([HEADER.split(","), *cells])
    path = write(tmp_path_factory.mktemp("csv") / "d.csv", text.getvalue())
    rows = [list(row.values()) for _, row in numbered(path)]  # type: ignore[attr-defined]
    assert rows == [[tables._value(cell) for cell in row] for row in cells]


def test_packed_tables_and_tsv_are_read_too(tmp_path: Path) -> None:
    content = "prompt\tanswer\nhi, you\t4\n"
    expected = [(2, {"prompt": "hi, you", "answer": "4"})]
    assert numbered(write(tmp_path / "d.tsv", content)) == expected
    assert numbered(write(tmp_path / "d.tsv.gz", gzip.compress(content.encode()))) == expected
    assert numbered(write(tmp_path / "d.csv.gz", gzip.compress(content.encode()))) == expected


def test_messages_in_a_cell_are_messages_and_other_brackets_are_text(tmp_path: Path) -> None:
    turns = '"[{""role"": ""user"", ""content"": ""Hi""}]"'
    path = write(tmp_path / "d.csv", f"{HEADER}\n{turns},[1],\"[{{'role': 'user'}}]\"\n[{{}},a,[{{}}]x\n")
    (_, first), (_, second) = numbered(path)
    assert first == {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "[1]", "rejected": "[{'role': 'user'}]"}
    assert second == {"prompt": "[{}", "chosen": "a", "rejected": "[{}]x"}


STOPPING = {
    "text after a quote": (f'{HEADER}\na,b,c\n"a"b,c,d\n', ":3: wrong quoting ("),
    "a quote that is not closed": (f'{HEADER}\na,b,c\nd,"e,f\ng,h,i\n', ":3: wrong quoting ("),
    "a cell too many": (f"{HEADER}\na,b,c\nd,e,f,g\n", ":3: 4 cells, and the header names 3 columns. A cell that holds a delimiter"),
    "a cell too few": (f'{HEADER}\n"a\nb",c,d\ne,f\n', ":4: 2 cells, and the header names 3 columns. "),
    "a name twice": ("prompt,chosen,prompt\n", ":1: the column 'prompt' is named twice. Rename one."),
    "not UTF-8": (
        HEADER.encode() + b"\na,b,c\nd,\xe9,f\n",
        ":3: not UTF-8 text (invalid continuation byte at byte 2). Save the file as CSV UTF-8.",
    ),
    "UTF-16": (HEADER.encode("utf-16"), ":1: not UTF-8 text (invalid start byte at byte 0). "),
}


@pytest.mark.parametrize("name", STOPPING)
def test_what_is_no_row_stops_the_reading_with_its_line(tmp_path: Path, name: str) -> None:
    content, message = STOPPING[name]
    assert refusal(write(tmp_path / "d.csv", content)).startswith(message)


def test_a_quote_that_swallows_the_rest_is_stopped_at_a_bound_and_its_row_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 2**20)
    path = write(tmp_path / "d.csv", f'{HEADER}\na,b,c\nd,"e,f\n' + "g,h,i\n" * 2**18)
    assert refusal(path).startswith(":3: a row of more than 1 MiB. Most likely a quote opens in this row and is never closed: ")


def test_a_cell_of_ten_megabytes_is_a_cell(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", f"{HEADER}\n{'x' * 10 * 2**20},b,c\n")
    assert len(numbered(path)[0][1]["prompt"]) == 10 * 2**20  # type: ignore[index]


def test_a_damaged_packed_table_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv.gz", gzip.compress(f"{HEADER}\n".encode() + b"a,b,c\n" * 999)[:-9])
    assert "breaks off or is damaged" in refusal(path)


@pytest.mark.parametrize("content", ["\n\n", HEADER, f"{HEADER}\n\n \n"])
def test_a_table_without_rows_holds_none(tmp_path: Path, content: str) -> None:
    assert numbered(write(tmp_path / "d.csv", content)) == []


def test_an_index_without_a_name_is_a_column_and_formulas_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", f",{HEADER}\n0,=HYPERLINK(1),@SUM(A1),-1\n")
    loaded = load_dataset_rows(path)
    assert isinstance(loaded, LoadedPairs)
    (pair,) = loaded.pairs
    assert (pair.messages[0]["content"], pair.chosen, pair.rejected) == ("=HYPERLINK(1)", "@SUM(A1)", "-1")
    assert pair.columns == {"column 1": "0"}


def test_pairs_scores_labels_and_prompts_come_in_tables(tmp_path: Path) -> None:
    pairs = load_dataset_rows(write(tmp_path / "p.csv", f"{HEADER},score_chosen,score_rejected\na,y,n,5,1\nb,y,n,2,2\nc,y,n,,\n"))
    assert (pairs.kept, pairs.dropped["tie"], pairs.form) == (2, 1, "prompt and replies")
    labels = load_dataset_rows(write(tmp_path / "l.csv", "prompt,completion,label\na,y,True\na,n,False\n"))
    assert (labels.kept, labels.form) == (1, "labels")
    prompts = load_dataset_rows(write(tmp_path / "q.csv", "prompt;answer;topic\n2 + 2?;4;sums\n"))
    assert isinstance(prompts, LoadedPrompts)
    assert prompts.prompts[0].columns == {"answer": "4", "topic": "sums"}
    assert prompts.prompts[0].source == "q"


def test_preview_and_stats_say_the_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.csv", f"{HEADER}\nhi,\x1b[2Jyes,no\n")
    assert run(["data", "preview", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "--- 1 rows, 1 usable, read as prompt and replies"
    assert "\x1b" not in shown
    assert run(["data", "stats", str(path)]) == 0
    assert "form               prompt and replies" in capsys.readouterr().out
