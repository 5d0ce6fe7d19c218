"""What the command line prints: no character that a terminal obeys, and no secret. Every other file of this folder prints through here."""

from __future__ import annotations

import sys

from gemma_grpo.escapes import visible
from gemma_grpo.redact import redact


def say(*lines: str, end: str = "\n", flush: bool = False) -> None:
    """Print to stdout."""
    print(visible(redact("\n".join(lines))), end=end, flush=flush)


def say_data(text: str) -> None:
    """Print rows of a dataset: what looks like a secret there is the dataset's own and stays."""
    print(visible(text))


def complain(text: str) -> None:
    """Print to stderr."""
    print(visible(redact(text)), file=sys.stderr)
