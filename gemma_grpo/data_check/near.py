"""Texts that are nearly the same, among very many: MinHash of three-word pieces, in bands (Broder 1997; Leskovec et al., Mining of Massive
Datasets, 3.3 and 3.4). Owns likeness; what it means for a dataset is repeats.py.

Bounded: a text counts with its first MAX_WORDS words, and in each band with one partner only, so that work and memory grow with the number
of texts however alike they are. A pair that the bands bring together is compared piece by piece: what is called near is near. Pairs of a
likeness of 0.8 are missed once in four thousand times; several near texts are told as copies of one.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

NEAR = 0.8
"""Share of the pieces of both texts together that both have (Jaccard), from which they are near."""
MAX_WORDS = 500
BANDS, ROWS_OF_BAND = 16, 4
"""A pair of likeness s meets in some band with the probability 1 - (1 - s^4)^16: 0.9998 at 0.8, 0.64 at 0.5, 0.03 at 0.2."""

_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # scripts without spaces: each character counts as a word
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_CHUNK = 2**16
"""Pieces that are hashed at a time: as many as stay in a processor's cache."""
_VOCABULARY = 2**20


def normalised(text: str) -> str:
    """The words of a text, case, spacing and punctuation aside; the text itself where it has no word."""
    return " ".join(_words(text)) or text.strip()


def near_twins(texts: Sequence[str], of: Sequence[bool] | None = None) -> list[int]:
    """For each text the place of another that it is near to, -1 where none was found.

    The other one is earlier in the list; with `of` it is any text for which that is True, and those have no twin themselves. `texts`
    are normalised; equal ones are near too.
    """
    count = len(texts)
    pieces = _Pieces(texts)
    signatures = _signatures(pieces)
    candidates = np.zeros(count, bool) if of is None else np.asarray(of, bool)
    twins = np.full(count, -1, np.int64)
    for band in range(BANDS):
        keys = _mixed(signatures[:, band * ROWS_OF_BAND : (band + 1) * ROWS_OF_BAND])
        order = np.lexsort((np.arange(count), ~candidates, keys))
        first = order[_starts_of_groups(keys[order])]  # of each place in this order, the first of its group
        may = (order != first) & (twins[order] < 0) & (candidates[first] & ~candidates[order] if of is not None else True)
        for place, other in zip(order[may].tolist(), first[may].tolist(), strict=True):
            if pieces.likeness(place, other) >= NEAR:
                twins[place] = other
    return [int(twin) for twin in twins]


class _Pieces:
    """Each text's distinct three-word pieces as 32-bit hashes, all in one array."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._hashes = _Hashes()
        parts = [self._of(text) for text in texts]
        self.all = np.concatenate(parts) if parts else np.zeros(0, np.uint32)
        self.starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def likeness(self, one: int, other: int) -> float:
        """Jaccard: common pieces of all pieces."""
        first, second = (self.all[self.starts[place] : self.starts[place + 1]] for place in (one, other))
        if min(len(first), len(second)) < NEAR * max(len(first), len(second)):
            return 0.0
        common = len(np.intersect1d(first, second, assume_unique=True))
        return common / (len(first) + len(second) - common)

    def _of(self, text: str) -> NDArray[np.uint32]:
        if len(self._hashes) > _VOCABULARY:
            self._hashes.clear()  # bounded; a word's hash is the same whenever it is made
        words = text.split(" ", MAX_WORDS)[:MAX_WORDS]
        hashes = np.fromiter(map(self._hashes.__getitem__, words), np.uint64, len(words))
        if len(hashes) >= 3:
            hashes = hashes[:-2] * np.uint64(0x9E3779B97F4A7C15) + hashes[1:-1] * np.uint64(0xC2B2AE3D27D4EB4F) + hashes[2:]
        else:
            hashes = np.array([zlib.crc32(" ".join(words).encode("utf-8", "surrogatepass"))], np.uint64)
        return np.unique((_scrambled(hashes) >> np.uint64(32)).astype(np.uint32))


class _Hashes(dict[str, int]):
    """Each word's hash, made when it is first asked for."""

    def __missing__(self, word: str) -> int:
        found = self[word] = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        return found


def _words(text: str) -> list[str]:
    return _WORD.findall((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold())


def _signatures(pieces: _Pieces) -> NDArray[np.uint32]:
    """[texts, BANDS x ROWS_OF_BAND]: under each of so many hash functions the smallest value of a text's pieces."""
    rng = np.random.default_rng(0)
    # a x + b modulo 2^64, of which the upper half is strongly universal for 32-bit x (Dietzfelbinger 1996)
    factors, addends = rng.integers(0, 2**64, (2, BANDS * ROWS_OF_BAND), np.uint64, endpoint=False)
    signatures = np.empty((len(pieces), len(factors)), np.uint32)
    begin = 0
    while begin < len(pieces):
        # whole texts, as many as fit into a chunk, one at least
        end = max(begin + 1, int(np.searchsorted(pieces.starts, pieces.starts[begin] + _CHUNK, "right")) - 1)
        values = pieces.all[pieces.starts[begin] : pieces.starts[end]].astype(np.uint64)
        offsets, hashed = pieces.starts[begin:end] - pieces.starts[begin], np.empty_like(values)
        for column, (factor, addend) in enumerate(zip(factors, addends, strict=True)):
            np.multiply(values, factor, out=hashed)
            np.add(hashed, addend, out=hashed)
            signatures[begin:end, column] = np.minimum.reduceat(hashed, offsets) >> np.uint64(32)
        begin = end
    return signatures


def _scrambled(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each value's bits spread over all 64 (a round of SplitMix64)."""
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)


def _mixed(columns: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """One number for each row of a few; rows that differ share one with a probability of 2^-64."""
    key = np.zeros(len(columns), np.uint64)
    for column in columns.T:
        key = _scrambled(key * np.uint64(0x9E3779B97F4A7C15) + column.astype(np.uint64) + np.uint64(1))
    return key


def _starts_of_groups(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each place in sorted keys, where its group of equal keys starts."""
    new = np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)]
    return np.maximum.accumulate(np.where(new, np.arange(len(keys)), 0))
