"""Bounded looks into a run's append-only logs, however long they are: by byte offsets, never a whole file.

A log only grows, but for a resume, which cuts it back to a checkpoint. Every line has its step, and steps never fall, so that a step is
found by halving. What is no JSON object is passed over and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gemma_grpo.monitor.run_files import Record, parse_object, real

WHOLE = 8 * 2**20
"""Bytes up to which a log is read line by line; above, as many lines as a chart has points stand for it."""
LONGEST_LINE = 32 * 2**20
"""Bytes. A longer line is passed over, as a damaged one is."""
_PIECE = 2**16


@dataclass(slots=True)
class Slice:
    """Some lines of a log, oldest first, and the bytes they were read from."""

    lines: list[Record]
    starts: list[int]
    """Where each of the lines begins."""
    start: int
    end: int
    damaged: int


def size(path: Path) -> int:
    """Bytes; 0 where there is no such file."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def lines_after(path: Path, offset: int, limit: int) -> Slice:
    """The whole lines from byte `offset` on, about `limit` bytes of them and at least one; a torn last one waits for its end."""
    return _slice(path, offset, offset + max(1, limit))


def lines_before(path: Path, offset: int, limit: int) -> Slice:
    """The whole lines before byte `offset`, about `limit` bytes of them and at least one."""
    with _opened(path) as log:
        start = line_start(log, max(0, offset - max(1, limit))) if log else 0
    return _slice(path, start, offset)


def _slice(path: Path, start: int, stop: int) -> Slice:
    """The whole lines that begin at `start` or later, and before `stop`."""
    found = Slice([], [], start, start, 0)
    for at, after, raw in _raw_lines(path, start):
        if at >= stop:
            break
        line = None if raw is None else parse_object(raw)
        if line is not None:
            found.lines.append(line)
            found.starts.append(at)
        found.end, found.damaged = after, found.damaged + (line is None)
    return found


def last_line(path: Path) -> Record:
    """The last whole line; empty where there is none. A torn one behind it is passed over."""
    end = size(path)
    while end > 0:
        found = lines_before(path, end, 1)
        if found.lines:
            return found.lines[-1]
        end = found.start
    return {}


def spread_lines(path: Path, count: int, *, whole: int = WHOLE) -> list[Record]:
    """All lines of a log of up to `whole` bytes; of a longer one about `count`, evenly over its bytes, the last among them."""
    total = size(path)
    if total <= whole:
        return lines_after(path, 0, total).lines
    with _opened(path) as log:
        starts = sorted({line_start(log, total * n // count) for n in range(count)}) if log else []
    found = [line for start in starts for line in lines_after(path, start, 1).lines]
    last = last_line(path)
    return found if found[-1:] == [last] else [*found, last]


def find_step(path: Path, step: int) -> int:
    """Byte at which the first line of `step`, or of the next step that there is, begins; the file's size behind the last."""
    low, high = 0, size(path)
    with _opened(path) as log:
        while log and low < high:  # the start that is looked for lies from low to high; both are starts of lines
            middle = line_start(log, (low + high) // 2)
            found = _step_from(path, middle, high)
            if found is not None and found < step:
                low = _next_line(log, middle)
            elif middle < high and middle != low:
                high = middle
            else:  # one line is left
                return low if found is not None else high
    return low


def _step_from(path: Path, start: int, stop: int) -> int | None:
    """The step of the first line from `start` on that has one."""
    for at, _, raw in _raw_lines(path, start):
        if at >= stop:
            break
        step = real((parse_object(raw) or {}).get("step")) if raw is not None else None
        if step is not None:
            return int(step)
    return None


def line_start(log: BinaryIO, offset: int) -> int:
    """Where the line that holds byte `offset` begins."""
    while offset > 0:
        begin = max(0, offset - _PIECE)
        log.seek(begin)
        place = log.read(offset - begin).rfind(b"\n")
        if place >= 0:
            return begin + place + 1
        offset = begin
    return 0


def _next_line(log: BinaryIO, offset: int) -> int:
    """Where the line after the one that begins at `offset` begins."""
    log.seek(offset)
    _pass_line(log)
    return log.tell()


def _raw_lines(path: Path, offset: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Start, end and bytes of every whole line from `offset` on; None for the bytes of one that is too long."""
    with _opened(path) as log:
        if log is None:
            return
        log.seek(offset)
        while raw := log.readline(LONGEST_LINE):
            whole: bytes | None = raw
            if not raw.endswith(b"\n"):
                if not _pass_line(log):
                    return  # torn: its writer is at it
                whole = None
            end = log.tell()
            yield offset, end, whole
            offset = end
            log.seek(offset)


def _pass_line(log: BinaryIO) -> bool:
    """Go behind the end of the present line; whether it has one."""
    while piece := log.readline(_PIECE):
        if piece.endswith(b"\n"):
            return True
    return False


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO | None]:
    """The file, None where there is none."""
    try:
        log = path.open("rb")
    except OSError:
        yield None
        return
    with log:
        yield log
