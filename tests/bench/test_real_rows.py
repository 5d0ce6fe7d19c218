"""The table of real rows is that of its results."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from bench.real_rows import DOCUMENT, LETTERS_270M, RESULTS, read_rows, short, table


def test_the_documents_table_is_that_of_the_results() -> None:
    document = DOCUMENT.path.read_text(encoding="utf-8")
    assert DOCUMENT.filled(document, table(json.loads(RESULTS.read_text(encoding="utf-8")))) == document


def test_sources_take_turns_and_short_rows_are_short_on_both_sides(tmp_path: Path) -> None:
    for name, lengths in (("harmless-base", (10, 500, 20)), ("helpful-base", (30,))):
        lines = [json.dumps({"chosen": "c" * n, "rejected": "r"}) for n in lengths]
        (tmp_path / f"{name}.dev.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    rows = read_rows(tmp_path)
    assert [row["source"] for row in rows] == ["harmless-base", "helpful-base", "harmless-base", "harmless-base"]
    assert [len(row["chosen"]) for row in short(rows)] == [10, 30, 20]
    assert max(len(row["chosen"]) for row in short(rows)) <= LETTERS_270M
    with pytest.raises(ValueError, match=r"has no \.jsonl\.gz"):
        read_rows(tmp_path / "elsewhere")
