"""Text of strangers made harmless to look at: control, bidirectional and invisible characters shown as escapes.

Owns what characters may reach a screen; HTML escaping is the report template's, secrets are redact.py's.
"""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"
_SHORT = {"\n": "\\n", "\t": "\\t"}


def visible(text: str, *, lines: bool = True, ascii_only: bool = False) -> str:
    """The text with every character a terminal or browser would obey, hide or reorder written out, such as \\x1b or \\u202e.

    All spaces stay; newlines and tabs do unless `lines` is False. Zero-width joiners stay where emoji and several scripts need them,
    between two characters beyond ASCII. `ascii_only` writes out everything beyond ASCII too.
    """
    if text.isascii() and text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(
        char if char in kept or ((char.isascii() or not ascii_only) and _harmless(text, index)) else _escape(char)
        for index, char in enumerate(text)
    )


def printable(text: str) -> str:
    """`visible` text on one line, its line breaks written out."""
    return visible(text, lines=False)


def one_line(text: str, *, limit: int, ascii_only: bool = False) -> str:
    """`visible` text on one line of at most `limit` characters, cut with an ellipsis; line breaks become spaces."""
    shown = visible(" ".join(text.split()), ascii_only=ascii_only)
    mark = "..." if ascii_only else "…"
    return shown if len(shown) <= limit else shown[: max(0, limit - len(mark))].rstrip() + mark


class VisibleStream:
    """`visible` text that comes in pieces: all that it gives out, joined, is what `visible` makes of all that came in, joined."""

    def __init__(self, *, ascii_only: bool = False) -> None:
        self._ascii_only = ascii_only
        self._before, self._held = "", ""

    def add(self, piece: str) -> str:
        """What can be shown now: a joiner waits for its neighbour."""
        text = self._held + piece
        ready = text.rstrip(_JOINERS)
        self._held = text[len(ready) :]
        return self._shown(ready)

    def end(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return self._shown(held)

    def _shown(self, text: str) -> str:
        if not text:
            return ""
        before, self._before = self._before, text[-1]
        return visible(before + text, ascii_only=self._ascii_only)[len(visible(before, ascii_only=self._ascii_only)) :]


def _harmless(text: str, index: int) -> bool:
    char = text[index]
    if char in _JOINERS:
        around = text[max(0, index - 1) : index] + text[index + 1 : index + 2]
        return len(around) == 2 and not any(neighbour.isascii() for neighbour in around) and around.isprintable()
    # not printable: control, format (bidi, zero-width, tags), surrogate, private, unassigned, and separators, of which spaces are fine
    return char.isprintable() or unicodedata.category(char) == "Zs"


def _escape(char: str) -> str:
    code = ord(char)
    if char in _SHORT:
        return _SHORT[char]
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
