"""Laws of text that fits: never wider than asked, nothing lost without a mark."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from gemma_grpo.monitor.terminal.drawing import bar, clock, cut, fold, sparkline

TEXTS = st.text(alphabet=st.sampled_from("ab c é漢字 …👍🏽e\u0301"), max_size=60)


def test_sparkline_scales_between_the_extremes_and_averages_what_does_not_fit() -> None:
    assert sparkline([0, 7, 2], 8, ascii_only=True) == "_#-"
    assert sparkline([0, 0, 1, 1], 2) == "▁█"
    assert sparkline([2, 2], 8) == "▁▁"
    assert sparkline([], 8) == ""
    assert sparkline([1, 2], -3) == ""


def test_clock_and_bar() -> None:
    assert [clock(s) for s in (0, 22, 725, 11045, 183600)] == ["0:00", "0:22", "12:05", "3:04:05", "2d 3h"]
    assert [bar(share, 4, ascii_only=True) for share in (-1, 0.5, 2)] == ["----", "##--", "####"]


@given(TEXTS, st.integers(-2, 40), st.booleans())
def test_what_is_cut_fits_and_what_fits_is_not_cut(text: str, cells: int, ascii_only: bool) -> None:
    shown = cut(text, cells, ascii_only)
    assert cell_len(shown) <= max(0, cells)
    assert shown == text or cell_len(text) > cells or cells <= 0 or len(text) > 4 * cells  # no more than four characters a cell


@given(TEXTS, st.integers(2, 30), st.integers(1, 6))
def test_what_is_folded_fits_and_keeps_every_word_or_ends_in_a_mark(text: str, cells: int, lines: int) -> None:
    folded = fold(text, cells, lines)
    assert len(folded) <= lines
    assert all(cell_len(line) <= cells for line in folded)
    assert "".join(folded).replace(" ", "") == text.replace(" ", "") or folded[-1].endswith("…")


def test_a_text_is_folded_between_words_and_a_long_word_inside() -> None:
    assert fold("the reward rose while it fell", 12, 9) == ["the reward", "rose while", "it fell"]
    assert fold("abcdefgh ij", 3, 9) == ["abc", "def", "gh", "ij"]
    assert fold("漢字漢字", 5, 2) == ["漢字", "漢字"]  # two cells each


@pytest.mark.parametrize(("ascii_only", "expected"), [(False, ["one", "two…"]), (True, ["one", "t..."])])
def test_the_last_line_says_that_there_is_more(ascii_only: bool, expected: list[str]) -> None:
    assert fold("one two six", 4, 2, ascii_only) == expected
