"""Laws of the looks into logs: what they find is what reading the whole file finds, torn, cut and damaged lines included."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_grpo.monitor.web import logs

PIECES = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 3), st.integers(0, 3)),  # a line: by how much the step rises, and how long the line is
        st.sampled_from(["nonsense", "[1]", "", '{"step": "x"}', "\x00\xff"]),
    ),
    max_size=40,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


def written(folder: Path, pieces: list[object], tail: str = "") -> tuple[Path, list[dict[str, object]]]:
    """A log, and the objects it holds."""
    lines, objects, step = [], [], 0
    for piece in pieces:
        if isinstance(piece, tuple):
            step += piece[0]
            objects.append({"step": step, "pad": "x" * (10 ** piece[1])})
            lines.append(json.dumps(objects[-1]))
        else:
            lines.append(str(piece))
            if piece == '{"step": "x"}':
                objects.append({"step": "x"})
    path = folder / "log.jsonl"
    path.write_bytes("".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass") + tail.encode())
    return path, objects


@settings(max_examples=150, deadline=None)
@given(PIECES, st.sampled_from(["", '{"step": 9', "x"]))
def test_forwards_and_backwards_every_line_comes_once(folder: Path, pieces: list[object], tail: str) -> None:
    path, objects = written(folder, pieces, tail)
    forwards, at = [], 0
    while (one := logs.lines_after(path, at, 50)).end > at:
        forwards += one.lines
        at = one.end
    backwards, end = [], logs.size(path)
    while end > 0:
        part = logs.lines_before(path, end, 50)
        backwards = part.lines + backwards
        end = part.start
    assert forwards == objects
    assert backwards == objects
    assert logs.last_line(path) == (objects[-1] if objects else {})
    assert logs.spread_lines(path, 10) == objects


@settings(max_examples=150, deadline=None)
@given(PIECES, st.integers(-1, 60))
def test_a_step_is_found_where_reading_all_finds_it(folder: Path, pieces: list[object], step: int) -> None:
    path, _ = written(folder, pieces)
    whole = logs.lines_after(path, 0, logs.size(path))
    later = [line for line in whole.lines if isinstance(line["step"], int) and line["step"] >= step]
    found = logs.lines_after(path, logs.find_step(path, step), logs.size(path))
    assert [line for line in found.lines if isinstance(line["step"], int)] == later


def test_damaged_lines_are_counted_and_a_torn_one_waits(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\nbroken\n{"step": 2}\n{"step": 3')
    found = logs.lines_after(path, 0, 1000)
    assert ([line["step"] for line in found.lines], found.starts, found.damaged, found.end) == ([1, 2], [0, 19], 1, 31)
    path.write_bytes(path.read_bytes() + b"}\n")
    assert [line["step"] for line in logs.lines_after(path, found.end, 1000).lines] == [3]


def test_a_missing_log_is_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    assert (logs.size(path), logs.last_line(path), logs.spread_lines(path, 5), logs.find_step(path, 3)) == (0, {}, [], 0)
    assert logs.lines_before(path, 100, 10).lines == logs.lines_after(path, 0, 10).lines == []


def test_a_line_too_long_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with path.open("wb") as log:
        log.write(b'{"step": 1}\n{"step": 2, "pad": "')
        for _ in range(logs.LONGEST_LINE // 2**20 + 1):
            log.write(b"x" * 2**20)
        log.write(b'"}\n{"step": 3}\n')
    found = logs.lines_after(path, 0, logs.size(path))
    assert ([line["step"] for line in found.lines], found.damaged) == ([1, 3], 1)


def test_two_hundred_megabytes_are_looked_into_without_being_read(tmp_path: Path) -> None:
    path, pad, steps = tmp_path / "log.jsonl", "x" * 4000, 50_000
    with path.open("w") as log:
        for step in range(1, steps + 1):
            log.write(f'{{"step": {step}, "pad": "{pad}"}}\n')
    assert logs.size(path) > 200e6
    tracemalloc.start()
    began = time.monotonic()
    spread = logs.spread_lines(path, 400)
    middle = logs.lines_after(path, logs.find_step(path, steps // 2), 1).lines
    seconds, (_, most) = time.monotonic() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 400 <= len(spread) <= 401
    assert [spread[0]["step"], spread[-1]["step"], middle[0]["step"]] == [1, steps, steps // 2]
    assert most < 16 * 2**20
    assert seconds < 2  # the bound; it takes hundredths
