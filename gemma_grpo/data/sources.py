"""Rows from wherever they lie: a file, the Hub, a list, a datasets.Dataset. Every way of failing has its own sentence.

Owns reading and naming; it does not know what a row means (hh_rlhf.py, prompts.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

from gemma_grpo.access import access_problem, hub_errors
from gemma_grpo.data.json_files import DataError, json_rows, jsonl_rows
from gemma_grpo.data.tables import table_rows

__all__ = ["DataError", "RowSource", "Rows", "describe_columns", "open_rows"]

RowSource: TypeAlias = "str | os.PathLike[str] | Iterable[Any]"

_LINES = (".jsonl", ".jsonl.gz")
_TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
FORMATS = (*_LINES, ".json", ".json.gz", *_TABLES, ".parquet")
_LFS_HEAD = b"version https://git-lfs"
_GZIP_HEAD = b"\x1f\x8b"
_HTML_HEADS = (b"<!doctype html", b"<html")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one source, read as they are asked for; they can be iterated once."""

    name: str
    """Short name of the origin: "harmless-base" for .../harmless-base.dev.jsonl.gz, "hh-rlhf" for Anthropic/hh-rlhf."""
    place: str
    """The origin as an error message names it."""
    numbered: Iterator[tuple[int, Any]]
    """Each row with its number: its line in a .jsonl or .csv file, else counted from 1."""
    by_line: bool = False

    def where(self, number: int) -> str:
        """A row's place as an error message names it."""
        return f"{self.place}:{number}" if self.by_line else f"{self.place}, row {number}"

    def peek(self, count: int) -> tuple[list[Any], Rows]:
        """The first rows, and all of them to be iterated."""
        first = list(islice(self.numbered, count))
        return [row for _, row in first], replace(self, numbered=chain(first, self.numbered))


def open_rows(source: RowSource) -> Rows:
    """Rows of a file, a Hub id, a list of rows or a datasets.Dataset; of several splits "train" is read.

    Raises DataError for what can be seen before the first row; reading on raises it with the line number. Raises AccessError for a Hub
    dataset that cannot be had: gated, private, missing, or not cached while offline.
    """
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        if not text:
            raise DataError("the dataset's name is empty. Give a path, or a Hub id such as Anthropic/hh-rlhf.")
        path = Path(os.path.expanduser(text))
        if os.path.exists(path) or not _looks_like_hub_id(text):
            by_line = path.name.endswith((*_LINES, *_TABLES))
            return Rows(_file_name(path), str(path), _file_rows(_checked_file(path)), by_line)
        return Rows(text.rpartition("/")[2], f"Hub dataset {text}", enumerate(_hub_rows(text), start=1))
    if isinstance(source, Mapping):
        return open_rows(_one_split(source, "the dataset"))
    if not isinstance(source, Iterable):
        raise DataError(f"the dataset is of type {type(source).__name__}. Give a path, a Hub id, a list of rows or a datasets.Dataset.")
    name = getattr(getattr(source, "info", None), "dataset_name", None) or "dataset"
    return Rows(str(name), "the given rows", enumerate(source, start=1))


def describe_columns(rows: Iterable[Any]) -> str:
    """The columns of some rows, for an error message."""
    names: dict[str, None] = {}
    kinds: dict[str, None] = {}
    for row in rows:
        if isinstance(row, Mapping):
            names.update(dict.fromkeys(str(key)[:40] for key in row))
        else:
            kinds[type(row).__name__] = None
    if names:
        return f"columns found: {', '.join(list(names)[:12])}"
    return f"rows of type {', '.join(kinds)}" if kinds else "no rows found"


def _looks_like_hub_id(text: str) -> bool:
    is_path = text.endswith(FORMATS) or os.path.isdir(text.partition("/")[0])
    return _HUB_ID.fullmatch(text) is not None and not is_path


def _file_name(path: Path) -> str:
    return path.name.partition(".")[0] or "dataset"


def _checked_file(path: Path) -> Path:
    if not os.path.exists(path):  # Path.exists raises for names too long to be one
        raise DataError(f"{str(path)[:200]}: no such file. {_nearest_files(path)}Check the path; a Hub dataset is named owner/name.")
    if path.is_dir():
        inside = _data_files(path)
        found = f"It holds {', '.join(inside[:5])}: give one of these." if inside else f"Give a file: {', '.join(FORMATS)}."
        raise DataError(f"{path} is a folder. {found}")
    if not path.is_file():
        raise DataError(f"{path} is not a regular file. Give a file: {', '.join(FORMATS)}.")
    if not path.name.endswith(FORMATS):
        raise DataError(f"{path}: unknown kind of file. Known are {', '.join(FORMATS)}; convert it, or pass a list of rows from Python.")
    try:
        _check_head(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error
    return path


def _check_head(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise DataError(f"{path} is empty (0 bytes). Download it again.")
    if head.startswith(_LFS_HEAD):
        raise DataError(f"{path} is a Git LFS pointer, not the data. Run `git lfs pull` in its repository.")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_HTML_HEADS):
        raise DataError(
            f"{path} is a web page (HTML), not the data: what a browser or curl saves where a login is needed. "
            "Download it again, logged in."
        )
    if path.suffix == ".gz" and not head.startswith(_GZIP_HEAD):
        raise DataError(f"{path} is named .gz but is not gzip-compressed. Rename it without .gz, or download it again.")
    if path.suffix != ".gz" and head.startswith(_GZIP_HEAD):
        raise DataError(f"{path} is gzip-compressed but not named .gz. Rename it to {path.name}.gz.")


def _data_files(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(FORMATS))
    except (OSError, ValueError):
        return []


def _nearest_files(path: Path) -> str:
    near = get_close_matches(path.name, _data_files(path.parent), n=3, cutoff=0.5)
    return f"Nearest: {', '.join(str(path.parent / name) for name in near)}. " if near else ""


def _file_rows(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix == ".parquet":
        return enumerate(_parquet_rows(path), start=1)
    if path.name.endswith((".json", ".json.gz")):
        return json_rows(path)
    return table_rows(path) if path.name.endswith(_TABLES) else jsonl_rows(path)


def _parquet_rows(path: Path) -> Iterator[Any]:
    # pyarrow, which datasets reads with: going through datasets would first copy the file into its cache
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error)[:200]}). Download it again.") from error


def _hub_rows(hub_id: str) -> Iterator[Any]:
    import datasets

    try:
        loaded = datasets.load_dataset(hub_id)
    except hub_errors(ValueError, datasets.exceptions.DatasetsError) as error:
        # datasets says "not found" for what is gated, private, offline or misspelt: the Hub itself is asked why
        problem = access_problem(hub_id, "dataset")
        reason = _first_line(error.__cause__ or error)  # datasets wraps what went wrong into "an error occurred"
        remedy = "Run the command again; if that does not help, give a file of its rows instead."
        unreadable = DataError(f"Hub dataset {hub_id} could not be read ({reason}). {remedy}")
        raise problem or unreadable from error
    return iter(_one_split(loaded, f"Hub dataset {hub_id}"))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _one_split(splits: Mapping[Any, Any], place: str) -> Iterable[Any]:
    chosen = "train" if "train" in splits else next(iter(splits), None) if len(splits) == 1 else None
    rows = splits[chosen] if chosen is not None else None
    if isinstance(rows, (str, bytes)) or not isinstance(rows, Iterable):
        found = ", ".join(map(str, splits)) or "nothing"
        raise DataError(f"{place} has no split named train (found: {found}). Pass one split, or a list of rows.")
    return rows
