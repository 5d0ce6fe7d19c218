"""The table of docs/performance.md, and what is not measured where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.__main__ import FASTER, RESULTS, TABLE, chart, missed, read_reports, table
from bench.growth import law
from bench.protocol import MIB
from bench.step import PEER_PYTHON, missing, run


def side(seconds: float, mib: float) -> dict[str, object]:
    return {"seconds": {"median": seconds}, "tokens_per_second": 320 / seconds, "peak_bytes": {"median": mib * MIB}, "phases": {}}


def test_a_row_says_both_medians_and_the_paired_ratio() -> None:
    ratio, memory = {"median": 4.04, "min": 3.9, "max": 4.5}, {"median": 8.0}
    summary = {"ours": side(2.0, 100), "trl": side(8.0, 800), "paired_ratio": ratio, "memory_ratio": memory}
    report = {"setting": {"model": "8m", "workload": "b"}, "summary": summary, "commit": "abc"}
    assert table([report]).splitlines()[2] == "| 8m (b) | 2.00 | 8.00 | **4.0x** | 3.9 to 4.5 | 160 | 40 | 100 | 800 | 8.0x | abc |"
    # 5x is promised of (b) on this shape, and half of the memory
    assert missed([report]) == ["8m (b): 4.04 times as fast as TRL; at least 5.0 is promised"]
    memory["median"], ratio["median"] = 1.9, 5.0
    assert missed([report]) == ["8m (b): 1.90 times as small as TRL; at least 2.0 is promised"]


def test_the_table_replaces_what_is_between_the_marks() -> None:
    once = TABLE.filled(f"before\n{TABLE.begin}old\n{TABLE.end}after\n", "new\n")
    assert once == f"before\n{TABLE.begin}new\n{TABLE.end}after\n"
    assert TABLE.filled(once, "new\n") == once
    with pytest.raises(ValueError, match="has no place for the table"):
        TABLE.filled("before\n", "new\n")


def test_the_document_shows_the_committed_results() -> None:
    text, reports = TABLE.path.read_text(encoding="utf-8"), read_reports()
    assert text == TABLE.filled(text, table(reports))
    assert (RESULTS / "step.svg").read_text(encoding="utf-8") == chart(reports)
    assert (RESULTS / "growth.svg").is_file()


def test_the_committed_results_keep_what_is_promised() -> None:
    reports = read_reports()
    assert {(report["setting"]["model"], report["setting"]["workload"]) for report in reports} >= set(FASTER) - {("4b", "b")}
    assert not missed(reports)
    assert all(max(report["agreement"]["relative_difference"].values()) <= 1e-4 for report in reports)
    growth = json.loads((RESULTS / "growth.json").read_text(encoding="utf-8"))
    assert all(one["holds"] for one in growth["laws"])


def test_what_cannot_be_measured_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "make bench" in (missing("8m", tmp_path / "bin" / "python") or "")
    if not torch.cuda.is_available():
        assert run("4b", "a", 1, out=tmp_path / "new.json") is None
        assert "skipped: the 4b shape is measured on a CUDA GPU, and there is none here." in capsys.readouterr().out


def test_a_result_that_is_there_is_not_measured_again(tmp_path: Path) -> None:
    there = tmp_path / "step.json"
    there.write_text("{}", encoding="utf-8")
    assert run("8m", "a", 1, out=there, peer_python=tmp_path / "bin" / "python") == there
    assert there.read_text(encoding="utf-8") == "{}"


def test_a_law_holds_up_to_its_limit() -> None:
    assert law("text", 3.2, 3.2)["holds"]
    assert not law("text", 3.21, 3.2)["holds"]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the 4b shape takes hours on a CPU")
@pytest.mark.skipif(not PEER_PYTHON.exists(), reason="needs TRL's environment: make .venv-peer/.installed")
def test_a_step_of_the_4b_shape_is_five_times_as_fast_as_trls(tmp_path: Path) -> None:
    out = run("4b", "b", 3, out=tmp_path / "step.json")
    assert out is not None
    summary = json.loads(out.read_text(encoding="utf-8"))["summary"]
    assert summary["paired_ratio"]["median"] >= 5
