"""Text of strangers made harmless to look at: control, bidirectional and invisible characters shown as escapes.

Owns only what characters may reach a screen; HTML escaping is the template's.
"""

from __future__ import annotations

import unicodedata


def visible(text: str, *, ascii_only: bool = False) -> str:
    """The text with every character a terminal or browser would obey, hide or reorder written out, such as \\x1b or \\u202e.

    Newlines, tabs and all spaces stay. `ascii_only` writes out everything beyond ASCII too.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if _harmless(char, ascii_only) else _escape(char) for char in text)


def one_line(text: str, *, limit: int, ascii_only: bool = False) -> str:
    """`visible` text on one line of at most `limit` characters, cut with an ellipsis; line breaks become spaces."""
    shown = visible(" ".join(text.split()), ascii_only=ascii_only)
    mark = "..." if ascii_only else "…"
    return shown if len(shown) <= limit else shown[: max(0, limit - len(mark))].rstrip() + mark


def _harmless(char: str, ascii_only: bool) -> bool:
    if char in "\n\t":
        return True
    if ascii_only and not char.isascii():
        return False
    # not printable: control, format (bidi, zero-width, tags), surrogate, private, unassigned, and separators, of which spaces are fine
    return char.isprintable() or unicodedata.category(char) == "Zs"


def _escape(char: str) -> str:
    code = ord(char)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
