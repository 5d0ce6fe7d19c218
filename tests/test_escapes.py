"""No character that a screen obeys, hides or reorders survives."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from gemma_grpo.escapes import VisibleStream, one_line, printable, visible


def test_terminal_commands_are_written_out() -> None:
    assert visible("\x1b[2J\x1b]0;title\x07") == "\\x1b[2J\\x1b]0;title\\x07"
    assert visible("\x9b31m\r\x7f\x00") == "\\x9b31m\\x0d\\x7f\\x00"


def test_bidi_zero_width_tags_and_surrogates_are_written_out() -> None:
    assert visible("a\u202eb\u2066c\u200bd\ufeff\u2028") == "a\\u202eb\\u2066c\\u200bd\\ufeff\\u2028"
    assert visible("\U000e0041\ud800") == "\\U000e0041\\ud800"


def test_ordinary_writing_is_left_alone() -> None:
    text = "Grüße – “日本語”\u3000です. 👩\u200d🔬\n\tx\u00a0y نمی\u200cدانم"
    assert visible(text) == text
    assert visible("é", ascii_only=True) == "\\xe9"


@given(st.text(st.characters() | st.sampled_from("\u200c\u200d\u202eaé")))
def test_nothing_but_line_breaks_tabs_spaces_and_joiners_at_work_is_unprintable(text: str) -> None:
    shown = visible(text)
    for before, char, after in zip(" " + shown, shown, shown[1:] + " ", strict=False):
        joins = char in "\u200c\u200d" and not (before + after).isascii() and (before + after).isprintable()
        assert char in "\n\t" or char.isprintable() or unicodedata.category(char) == "Zs" or joins
    assert visible(text, ascii_only=True).isascii()
    assert not set(printable(text)) & set("\n\t")
    shown.encode()  # no lone surrogate is left


def test_a_joiner_that_joins_nothing_is_written_out() -> None:
    assert visible("pass\u200cword \u200d\u200dé\u200d") == "pass\\u200cword \\u200d\\u200dé\\u200d"


def test_on_one_line_breaks_are_written_out() -> None:
    assert printable("a\nb\tc\r") == "a\\nb\\tc\\x0d"


def test_one_line_joins_lines_and_marks_the_cut() -> None:
    assert one_line("one\n\n  two", limit=20) == "one two"
    assert one_line("one two three", limit=8) == "one two…"
    assert one_line("one two three", limit=8, ascii_only=True) == "one t..."


@given(st.lists(st.text(st.characters() | st.sampled_from("\u200c\u200d\x1baé👩"), max_size=3)), st.booleans())
def test_text_in_pieces_is_shown_as_the_whole_is(pieces: list[str], ascii_only: bool) -> None:
    stream = VisibleStream(ascii_only=ascii_only)
    assert "".join([*map(stream.add, pieces), stream.end()]) == visible("".join(pieces), ascii_only=ascii_only)


def test_text_in_pieces_waits_for_nothing_but_a_joiners_neighbour() -> None:
    stream = VisibleStream()
    assert [stream.add(piece) for piece in ("👩", "\u200d", "🔬", "a\u200d", "b")] == ["👩", "", "\u200d🔬", "a", "\\u200db"]
