"""The run as one output of a notebook's cell, updated in place. Talks to the kernel that runs it, and imports nothing of IPython."""

from __future__ import annotations

import html
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from gemma_grpo.escapes import visible
from gemma_grpo.monitor.terminal.lines import table_lines
from gemma_grpo.monitor.terminal.picture import Part, picture
from gemma_grpo.monitor.terminal.seen import Seen

Publish = Callable[[dict[str, str], str, bool], None]
"""Contents by MIME type, the name of the output, and whether it is there already."""

WIDTH, HEIGHT = 100, 40
EVERY = 3.0
"""Seconds between two updates: each goes over the network, and Colab keeps what it was sent."""
_KEPT = 200
"""Lines said that the output holds."""
_COLOURS = {"red": "#c62828", "green": "#2e7d32", "yellow": "#b26a00", "cyan": "#00738a", "bold": "inherit", "dim": "inherit"}


def publisher() -> Publish | None:
    """The kernel's way to show something, where this process is a notebook's kernel: IPython is loaded then, and knows it."""
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    if getattr(shell, "kernel", None) is None:  # none, or IPython in a terminal
        return None

    def publish(data: dict[str, str], name: str, update: bool) -> None:
        shell.display_pub.publish(data=data, metadata={}, transient={"display_id": name}, update=update)

    return publish


class Notebook:
    """One output; what is said stands in it above the picture, so that nothing is scrolled away."""

    def __init__(self, publish: Publish, seen: Seen, every: float = EVERY) -> None:
        self._publish, self._seen, self._every = publish, seen, every
        self._said: list[tuple[Part, ...]] = []
        self._forgotten = 0
        self._name, self._shown = "", False
        self._changed, self._over = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._said, self._forgotten, self._name, self._shown = [], 0, uuid.uuid4().hex, False
        self._over.clear()
        self._show()
        self._thread = threading.Thread(target=self._redraw, daemon=True, name="notebook view")
        self._thread.start()

    def stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._over.set()
        self._changed.set()
        thread.join()
        self._show()

    def phase(self) -> None:
        if self._thread is None:
            self._keep(((self._seen.phase, "bold"),))
        self._changed.set()

    def step(self) -> None:
        self._changed.set()

    training = look = step

    def say(self, prefix: str, text: str, style: str) -> None:
        self._keep(((prefix, style), (visible(text), "")))

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        lines = table_lines([[visible(cell, lines=False) for cell in row] for row in rows])
        self._keep(((title, "bold"), *((f"\n{line}", "") for line in lines)))

    def _keep(self, said: tuple[Part, ...]) -> None:
        if self._thread is None:  # no run is shown: an output of its own
            self._publish(_contents([said]), uuid.uuid4().hex, False)
            return
        with self._lock:
            self._forgotten += max(0, len(self._said) + 1 - _KEPT)
            self._said = [*self._said, said][-_KEPT:]
        self._show()  # at once: it may be the last thing that is seen

    def _redraw(self) -> None:
        """In a thread of its own: what is held back for being too soon is shown a little later, and the clock goes on."""
        while not self._over.wait(self._every):
            if self._changed.is_set() or self._seen.phase:
                self._changed.clear()
                self._show()

    def _show(self) -> None:
        with self._lock:
            rows = picture(self._seen, WIDTH, HEIGHT, ascii_only=False, now=time.monotonic())
            above: list[tuple[Part, ...]] = [((f"{self._forgotten} earlier ones are in events.jsonl", "dim"),)] if self._forgotten else []
            self._publish(_contents([*above, *self._said, *(row.parts for row in rows)]), self._name, self._shown)
            self._shown = True


def _contents(lines: Sequence[tuple[Part, ...]]) -> dict[str, str]:
    """As HTML with its text escaped, and as plain text for what shows no HTML."""
    plain = "\n".join("".join(visible(text) for text, _ in line).rstrip() for line in lines)
    marked = "\n".join("".join(_span(text, style) for text, style in line) for line in lines)
    return {
        "text/plain": plain,
        "text/html": f'<pre style="white-space:pre-wrap;line-height:1.3;font-family:monospace">{marked}</pre>',
    }


def _span(text: str, style: str) -> str:
    """A text in its style; the colours are dark enough on white and light enough on black."""
    shown = html.escape(visible(text))
    if not style or not text:
        return shown
    words = style.split()
    rules = [f"color:{_COLOURS[word]}" for word in words if word not in ("bold", "dim")]
    rules += ["font-weight:bold"] if "bold" in words else []
    rules += ["opacity:0.65"] if "dim" in words else []
    return f'<span style="{";".join(rules)}">{shown}</span>'
