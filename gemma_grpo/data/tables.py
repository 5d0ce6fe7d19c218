"""Rows of .csv and .tsv files, gzipped or not: a header of names, then a row of texts each. Knows quoting, not what a row means.

Put right without a word: a byte order mark, CRLF, blank lines, white space around names, line breaks inside quotes. The delimiter is the
one of , ; tab | that parts the header into most names. A nameless column (an index that pandas wrote) is called "column 1".
A cell that is a JSON list of objects, as messages are, becomes that list; every other cell stays text, formulas too: nothing runs them.
Stops the reading, with the line: wrong quoting, a row with more or fewer cells than the header, a name given twice, what is not UTF-8, a
row of more than MAX_LINE_BYTES, which is what a quote that is never closed makes of the rest of the file.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from gemma_grpo.data.json_files import GZIP_ERRORS, MAX_DEPTH, MAX_LINE_BYTES, DataError, broken_gzip, depth_exceeds, open_file

DELIMITERS = (",", ";", "\t", "|")

_BOM = b"\xef\xbb\xbf"


def table_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line on which it begins, row) of every row that is not blank, read as they are asked for. Raises DataError with the line."""
    # the limit is the csv module's own, for all readers of the process: it is raised, never lowered
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    with open_file(path) as file:
        try:
            yield from _rows(_Lines(path, file), path)
        except GZIP_ERRORS as error:
            raise broken_gzip(path, "before its end") from error


class _Lines:
    """Lines as text, the first without its mark; counts them and the bytes since the row began."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self.number, self.began, self._size = 0, 1, 0

    def begin_row(self) -> None:
        """The next line begins a row."""
        self.began, self._size = self.number + 1, 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_LINE_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self._size += len(line)
        if self._size > MAX_LINE_BYTES:
            raise DataError(
                f"{self._path}:{self.began}: a row of more than {MAX_LINE_BYTES // 2**20} MiB. Most likely a quote opens in this row "
                'and is never closed: close it, and write a quote inside a cell twice ("").'
            )
        try:
            return (line.removeprefix(_BOM) if self.number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._path}:{self.number}: not UTF-8 text ({error.reason} at byte {error.start}). Save the file as CSV UTF-8."
            ) from error


def _rows(lines: _Lines, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    header = next(lines, None)
    while header is not None and not header.strip():
        header = next(lines, None)
    if header is None:
        return
    delimiter = _delimiter(header)
    names = _names(header, delimiter, f"{path}:{lines.number}")
    lines.begin_row()
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f'{path}:{lines.began}: wrong quoting ({error}). Put the cell into quotes and double those in it ("").'
            ) from error
        if cells is None:
            return
        if cells and (len(names) == 1 or cells != [cells[0]] or cells[0].strip()):
            yield lines.began, _row(names, cells, f"{path}:{lines.began}")
        lines.begin_row()


def _delimiter(header: str) -> str:
    """The one that parts the header into most names; of equals the first."""
    return max(DELIMITERS, key=lambda delimiter: len(_cells(header, delimiter)))


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line.rstrip("\r\n")], delimiter=delimiter), [])


def _names(header: str, delimiter: str, where: str) -> list[str]:
    names = [name.strip() or f"column {place}" for place, name in enumerate(_cells(header, delimiter), start=1)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: the column {twice[:40]!r} is named twice. Rename one.")
    return names


def _row(names: list[str], cells: list[str], where: str) -> dict[str, Any]:
    if len(cells) != len(names):
        raise DataError(
            f"{where}: {len(cells)} cells, and the header names {len(names)} columns. A cell that holds a delimiter or a line break "
            "must stand in quotes."
        )
    return {name: _value(cell) for name, cell in zip(names, cells, strict=True)}


def _value(cell: str) -> Any:
    """The cell's text, or the list of objects that it is in JSON."""
    if not (cell.startswith("[") and cell[1:].lstrip().startswith("{") and cell.rstrip().endswith("]")):
        return cell
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    is_list = isinstance(found, list) and all(isinstance(item, dict) for item in found)
    return found if is_list and not depth_exceeds(found, MAX_DEPTH) else cell
