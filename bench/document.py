"""The part of a document that a command writes: what stands between two marks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WrittenPart:
    """The lines of `path` between two marks, which are lines too."""

    path: Path
    begin: str
    end: str

    def filled(self, document: str, text: str) -> str:
        """The document with this text between the marks. Raises ValueError where it has none."""
        head, begin, rest = document.partition(self.begin)
        _, end, tail = rest.partition(self.end)
        if not begin or not end:
            marks = f"{self.begin.strip()!r} and {self.end.strip()!r}"
            raise ValueError(f"{self.path.name} has no place for the table. Put {marks} where it belongs.")
        return f"{head}{begin}{text}{end}{tail}"

    def write(self, text: str) -> None:
        """Put this text there. Raises ValueError where the document has no marks."""
        self.path.write_text(self.filled(self.path.read_text(encoding="utf-8"), text), encoding="utf-8")
