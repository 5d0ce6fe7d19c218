"""Rows of .json and .jsonl files, gzipped or not, each with its line or number. Knows what is JSON, not what a row means.

Put right without a word: a byte order mark at a line's start, CRLF, blank lines, a last line without its end, zeros after a gzip member.
Read as it stands: NaN, Infinity and numbers too large for a float (tables written by other tools hold them; a reward sees them in the
row's further columns), \\u0000, and halves of surrogate pairs (hh_rlhf.py counts those rows).
Stops the reading, with the line: what is not JSON or not UTF-8, a key given twice in one object, more than MAX_DEPTH levels, a line of
more than MAX_LINE_BYTES, gzip data that breaks off or is damaged. Memory is bounded whatever a file unpacks to.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

MAX_LINE_BYTES = 16 * 2**20
"""A row of hh-rlhf has 2 KB. A line without an end would be read until memory is gone."""
MAX_JSON_BYTES = 256 * 2**20
"""A .json file is read whole, into several times its size."""
MAX_DEPTH = 100
"""Rows are columns of text or lists of messages; what is deeper breaks code that walks it level by level."""

_BOM = b"\xef\xbb\xbf"
GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)


class DataError(ValueError):
    """Data that cannot be used: what is wrong, where, and how to mend it."""


def jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of every line that is not blank, read as they are asked for. Raises DataError with the line."""
    number = 0
    with open_file(path) as file:
        try:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}:{number}: a line of more than {MAX_LINE_BYTES // 2**20} MiB. A .jsonl file has one row a line: "
                        "write it so, or cut the row."
                    )
                if text := line.removeprefix(_BOM).strip():
                    yield number, _parsed(text, f"{path}:{number}")
        except GZIP_ERRORS as error:
            raise broken_gzip(path, f"after line {number}") from error


def json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, value) of the list in a .json file. Raises DataError."""
    rows = _parsed(_whole(path).removeprefix(_BOM), str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path} holds {type(rows).__name__}, expected a list of objects. One object a line belongs in a .jsonl file.")
    yield from enumerate(rows, start=1)


def open_file(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked where its name ends in .gz."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _whole(path: Path) -> bytes:
    parts: list[bytes] = []
    left = MAX_JSON_BYTES
    with open_file(path) as file:
        try:
            while part := file.read(2**20):
                parts.append(part)
                left -= len(part)
                if left < 0:
                    raise DataError(
                        f"{path}: more than {MAX_JSON_BYTES // 2**20} MiB of JSON, which would be read whole. "
                        "Write one object a line to a .jsonl file, which is read line by line."
                    )
        except GZIP_ERRORS as error:
            raise broken_gzip(path, "before its end") from error
    return b"".join(parts)


class _TwiceError(Exception):
    """A key of one object that is given twice: either value could be meant."""


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        raise _TwiceError(Counter(name for name, _ in items).most_common(1)[0][0])
    return found


def _parsed(data: bytes, where: str) -> Any:
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}). Save the file as UTF-8.") from error
    except RecursionError as error:
        raise _too_deep(where) from error
    except _TwiceError as error:
        raise DataError(f"{where}: the key {str(error)[:40]!r} is given twice in one object. Keep one.") from None
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where}: not JSON ({reason}). The file may be cut off: download it again, or mend this line.") from error
    # brackets can stand in text too: looking is for the few rows that have as many
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and depth_exceeds(value, MAX_DEPTH):
        raise _too_deep(where)
    return value


def depth_exceeds(value: Any, limit: int) -> bool:
    """Whether lists and objects stand inside each other more than `limit` times; no recursion, which would be the damage itself."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(limit):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in level if isinstance(inner, (dict, list))]
    return bool(level)


def _too_deep(where: str) -> DataError:
    return DataError(f"{where}: nested deeper than {MAX_DEPTH} levels. A row is an object of texts or lists of messages: flatten it.")


def broken_gzip(path: Path, where: str) -> DataError:
    """The error for what one of GZIP_ERRORS was raised for."""
    return DataError(f"{path}: the gzip data breaks off or is damaged {where}. Download it again.")
