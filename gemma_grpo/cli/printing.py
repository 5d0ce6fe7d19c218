"""What the command line prints: no character that a terminal obeys, and no secret. Every other file of this folder prints through here."""

from __future__ import annotations

import sys

from gemma_grpo.escapes import VisibleStream, visible
from gemma_grpo.launched import is_first
from gemma_grpo.redact import redact


def say(*lines: str, end: str = "\n", flush: bool = False) -> None:
    """Print to stdout; of several ranks the first alone."""
    if is_first():
        print(visible(redact("\n".join(lines))), end=end, flush=flush)


def say_data(text: str) -> None:
    """Print rows of a dataset: what looks like a secret there is the dataset's own and stays."""
    print(visible(text))


def say_link(text: str) -> None:
    """Print a link that holds a token, for whoever started what it leads to."""
    print(visible(text), flush=True)


class ModelText:
    """Prints a model's words while they come, after a label. Only a label stands at the beginning of a line: no reply can look like one."""

    def __init__(self, label: str) -> None:
        self._stream = VisibleStream(ascii_only=not is_utf8())
        say(label, end="", flush=True)

    def add(self, piece: str) -> None:
        """Some more of the reply."""
        self._print(self._stream.add(piece))

    def end(self) -> None:
        """The reply is over."""
        self._print(self._stream.end())
        print(flush=True)

    def _print(self, text: str) -> None:
        if text:
            print(text.replace("\n", "\n  "), end="", flush=True)


def is_utf8() -> bool:
    """Whether stdout takes every character."""
    return (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") in ("utf8", "utf8sig")


def complain(text: str) -> None:
    """Print to stderr."""
    print(visible(redact(text)), file=sys.stderr)
