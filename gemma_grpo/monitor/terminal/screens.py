"""Where a run is looked at: a terminal that is redrawn, or any other stream, which gets plain ASCII lines. notebook.py is the third."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gemma_grpo.escapes import visible
from gemma_grpo.monitor.terminal.lines import look_line, step_line, table_lines, training_line
from gemma_grpo.monitor.terminal.picture import picture
from gemma_grpo.monitor.terminal.seen import Seen

_LEFT_ABOVE = 4
"""Rows that the picture leaves to what was said last."""


class Screen(Protocol):
    """Shows what was seen."""

    def start(self) -> None:
        """A run begins."""

    def stop(self) -> None:
        """Nothing more will change; the last picture stays. Stopping twice is fine."""

    def phase(self) -> None:
        """A new phase was seen."""

    def training(self) -> None:
        """An update of a judge's training was seen."""

    def step(self) -> None:
        """A step was seen."""

    def look(self) -> None:
        """A look was seen."""

    def say(self, prefix: str, text: str, style: str) -> None:
        """Something to be kept."""

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """A table to be kept; its first row is the header."""


class Output:
    """Standard output until it takes no more, and nothing from then on: a run outlives a closed terminal or a `| head`."""

    def __init__(self) -> None:
        self._open = True

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def isatty(self) -> bool:
        """Whether it is a terminal; False when it was closed from the start."""
        stream = self._stream()
        return stream is not None and not getattr(stream, "closed", False) and bool(stream.isatty())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream(), name)

    def _stream(self) -> Any:
        """What it is now, and not what rich puts in its place, which would come back here."""
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    def _try(self, what: str, *text: str) -> None:
        stream = self._stream()
        if stream is None or not self._open:
            return
        self._open = False
        with suppress(OSError):
            getattr(stream, what)(*text)
            self._open = True


class Terminal:
    """The picture at the bottom of a terminal, redrawn in place; what is said stands above it and stays."""

    def __init__(self, console: Console, seen: Seen) -> None:
        self._console, self._seen = console, seen
        self._ascii = not console.encoding.lower().replace("-", "").startswith("utf8")
        # standard error that goes elsewhere, such as to a file, must go on going there
        errors = bool(sys.stderr is not None and sys.stderr.isatty())
        self._live = Live(
            console=console,
            get_renderable=self._picture,
            refresh_per_second=2,
            redirect_stderr=errors,
            vertical_overflow="crop",  # rich's other ways to overflow do not keep to the encoding
        )

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        if self._live.is_started:
            self._live.stop()

    def phase(self) -> None:
        if self._live.is_started:
            self._live.refresh()
        else:  # an evaluation by itself
            self.say("", self._seen.phase, "")

    def training(self) -> None:
        pass  # many in a second on a small model; the picture is drawn twice in one anyway

    def step(self) -> None:
        if self._live.is_started:
            self._live.refresh()

    look = step

    def say(self, prefix: str, text: str, style: str) -> None:
        self._console.print(Text.assemble((prefix, style), visible(text, ascii_only=self._ascii)))

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        header, *body = [[visible(cell, ascii_only=self._ascii) for cell in row] for row in rows]
        title = visible(title, ascii_only=self._ascii)
        grid = Table(title=Text(title), title_justify="left", box=box.ASCII if self._ascii else box.SIMPLE_HEAD)
        for index, cell in enumerate(header):
            grid.add_column(Text(cell), justify="left" if index == 0 else "right", overflow="fold")
        for row in body:
            grid.add_row(*(Text(cell) for cell in row))
        self._console.print(grid)

    def _picture(self) -> Group:
        width, height = self._console.size
        rows = picture(self._seen, width, max(1, height - _LEFT_ABOVE), ascii_only=self._ascii, now=time.monotonic())
        return Group(*(Text.assemble(*row.parts, no_wrap=True, overflow="crop") for row in rows))


class Log:
    """One line for whatever happens, plain ASCII; nothing is ever taken back."""

    def __init__(self, console: Console, seen: Seen) -> None:
        self._console, self._seen = console, seen
        self._told = ("", -1)

    def start(self) -> None:
        pass

    stop = start

    def phase(self) -> None:
        self._line(self._seen.phase)

    def training(self) -> None:
        now = self._seen.training
        if now is None:
            return
        twentieth = (now.adapter, now.update * 20 // max(now.total, 1))
        if twentieth != self._told or now.update == now.total:
            self._told = twentieth
            self._line(training_line(now))

    def step(self) -> None:
        self._line(step_line(self._seen))

    def look(self) -> None:
        self._line(look_line(self._seen))

    def say(self, prefix: str, text: str, style: str) -> None:
        self._line(prefix + text)

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        clean = [[visible(cell, ascii_only=True) for cell in row] for row in rows]
        for line in (title, *table_lines(clean)):
            self._line(line)

    def _line(self, text: str) -> None:
        # past rich, which would fold long lines at a width a log file does not have
        self._console.file.write(visible(text, ascii_only=True).replace("\n", "\n  ") + "\n")
        self._console.file.flush()
