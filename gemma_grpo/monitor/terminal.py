"""What a run shows in the terminal: a live view, or one plain ASCII line per step where there is no terminal to redraw.

Reads types.py's nouns only; never a trainer. Reward comes first; the loss is a detail, because GRPO's loss says nothing about progress.
Model text is shown through escapes.visible and never as rich markup.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from types import TracebackType
from typing import Any, TextIO, cast

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gemma_grpo.escapes import one_line, visible
from gemma_grpo.monitor.profile_table import TITLE, profile_notes, profile_rows
from gemma_grpo.monitor.run_files import Record
from gemma_grpo.redact import redact
from gemma_grpo.types import ScoredGroup, StepRecord

_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_PACE_STEPS = 20
"""Steps whose mean time gives the ETA."""


class _Output:
    """Standard output until it takes no more, and nothing from then on: a run outlives a closed terminal or a `| head`."""

    def __init__(self) -> None:
        self._open = True

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

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


class ProgressView:
    """Shows a run while it goes; a context manager. Without a terminal it prints lines, so nothing scrolls an error away."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=cast(TextIO, _Output()), highlight=False, markup=False, emoji=False)
        live = self._console.is_terminal and not self._console.is_dumb_terminal and not self._console.is_jupyter
        self._ascii = not live or not self._console.encoding.lower().replace("-", "").startswith("utf8")
        self._phase, self._phase_start = "", time.monotonic()
        self._body: tuple[RenderableType, ...] = ()
        self._rewards: list[float] = []
        self._kls: list[float] = []
        self._pace: list[Mapping[str, float]] = []
        self._reward_start: float | None = None
        self._first_update = 0
        self._reward_told = -1
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=2) if live else None

    def __enter__(self) -> ProgressView:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop redrawing; the last picture stays above whatever is printed next."""
        if self._live and self._live.is_started:
            self._phase = ""
            self._live.stop()

    def phase(self, name: str, detail: str = "") -> None:
        """A new stage of the run begins."""
        self._phase, self._phase_start = self._clean(f"{name}: {detail}" if detail else name), time.monotonic()
        if not self._live:
            self._line(self._phase)

    def note(self, text: str) -> None:
        """Something worth knowing, kept on the screen above the live view."""
        self._say(text, "note: ", "cyan")

    def warn(self, text: str) -> None:
        """Something that may need the user, kept on the screen above the live view."""
        self._say(text, "warning: ", "yellow")

    def reward_training(self, update: int, total: int, loss: float, accuracy: float) -> None:
        """Progress of the reward adapter: `accuracy` is the share of pairs it orders as people did. About 20 lines without a terminal."""
        now = time.monotonic()
        if self._reward_start is None or update <= 1:
            self._reward_start, self._first_update = now, update
        done = update - self._first_update
        left = (now - self._reward_start) / done * (total - update) if done else None
        eta = "" if left is None else f"  ETA {clock(left)}"
        text = f"reward adapter {update}/{total}  pair accuracy {accuracy:.1%}  loss {loss:.3f}{eta}"
        if self._live:
            self._body = (Text(f" {bar(update / max(total, 1), 24, self._ascii)}  {text}"),)
        elif update * 20 // max(total, 1) != self._reward_told or update == total:
            self._reward_told = update * 20 // max(total, 1)
            self._line(text)

    def step(self, record: StepRecord, total_steps: int, group: ScoredGroup | None = None) -> None:
        """One training step is done. `group` is one of its groups, shown with its best and its worst completion."""
        metrics = record.metrics
        self._rewards.append(metrics.get("reward", 0.0))
        self._kls.append(metrics.get("kl", 0.0))
        self._pace = [*self._pace, record.seconds][-_PACE_STEPS:]
        if not self._live:
            self._line(self._step_line(record, total_steps))
            return
        rows = [*self._step_rows(record, total_steps), *(self._group_rows(group) if group else ())]
        self._body = tuple(rows)

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """A titled table, kept on the screen; the first row is the header. Without a terminal its columns are aligned by spaces."""
        header, *body = [[self._clean(str(cell)) for cell in row] for row in rows]
        if not self._live:
            widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
            self._line(self._clean(title))
            for first, *numbers in (header, *body):
                cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))]
                self._line("  ".join(cells).rstrip())
            return
        grid = Table(title=Text(self._clean(title)), title_justify="left", box=box.ASCII if self._ascii else box.SIMPLE_HEAD)
        for index, cell in enumerate(header):
            grid.add_column(Text(cell), justify="left" if index == 0 else "right", overflow="fold")
        for row in body:
            grid.add_row(*(Text(cell) for cell in row))
        self._console.print(grid)

    def profile(self, profile: Record) -> None:
        """The run is over, and this is where its time went: profile.json, below the last picture."""
        self.close()
        if rows := profile_rows(profile):
            self.table(TITLE, rows)
        for text in profile_notes(profile):
            self.note(text)

    def _render(self) -> RenderableType:
        if not self._phase:
            return Group(*self._body)
        head = _row((f" {self._phase}", "bold"), (f"  {clock(time.monotonic() - self._phase_start)}", "dim"))
        return Group(head, *self._body)

    def _step_line(self, record: StepRecord, total: int) -> str:
        m = record.metrics
        parts = [f"step {record.step}/{total}", f"reward {m.get('reward', 0.0):.3f}"]
        names = (
            ("reward_std", "+- {:.3f}"),
            ("kl", "kl {:.4f}"),
            ("entropy", "entropy {:.2f}"),
            ("completions/mean_length", "length {:.0f}"),
        )
        parts += [pattern.format(m[name]) for name, pattern in names if name in m]
        return "  ".join([*parts, f"[{self._phases()}]", f"ETA {clock(self._left(record.step, total))}"])

    def _step_rows(self, record: StepRecord, total: int) -> list[RenderableType]:
        m, width = record.metrics, max(8, min(32, self._console.width - 50))
        reward = f"{m.get('reward', 0.0):7.3f} {'+-' if self._ascii else '±'} {m.get('reward_std', 0.0):.3f}  "
        first = f"  first {self._rewards[0]:.3f}"
        clipped = f" ({m['completions/clipped_ratio']:.0%} cut off)" if "completions/clipped_ratio" in m else ""
        details = ("loss", "grad_norm", "learning_rate", "beta", "frac_reward_zero_std", "rollbacks")
        progress = f" {bar(record.step / max(total, 1), 24, self._ascii)}  step {record.step}/{total}  "
        return [
            _row(progress, (f"ETA {clock(self._left(record.step, total))}", "bold")),
            _row((" reward   ", "dim"), (reward, "bold green"), sparkline(self._rewards, width, self._ascii), (first, "dim")),
            _row((" KL       ", "dim"), f"{m.get('kl', 0.0):7.4f} nat/token  ", sparkline(self._kls, width, self._ascii)),
            _row((" entropy  ", "dim"), f"{m.get('entropy', 0.0):7.3f} nat/token"),
            _row((" length   ", "dim"), f"{m.get('completions/mean_length', 0.0):7.1f} tokens{clipped}"),
            _row((" time       ", "dim"), self._phases()),
            _row((" details    " + "  ".join(f"{name} {m[name]:.3g}" for name in details if name in m), "dim")),
        ]

    def _group_rows(self, scored: ScoredGroup) -> list[RenderableType]:
        ranked = sorted((reward, index) for index, reward in enumerate(scored.rewards) if reward is not None)
        if not ranked:
            return []
        room = max(20, self._console.width - 22)
        last_turn = scored.group.prompt.messages[-1]["content"] if scored.group.prompt.messages else ""
        rows: list[RenderableType] = [_row((" prompt     ", "dim"), one_line(last_turn, limit=room, ascii_only=self._ascii))]
        for name, style, (reward, index) in (("best", "green", ranked[-1]), ("worst", "red", ranked[0])):
            text = one_line(scored.group.completions[index].text, limit=room, ascii_only=self._ascii)
            rows.append(_row((f" {name:5}{reward:10.3f}  ", style), text))
        return rows

    def _phases(self) -> str:
        """Share of each phase in the last steps' time."""
        names = list(dict.fromkeys(name for seconds in self._pace for name in seconds))
        sums = {name: sum(seconds.get(name, 0.0) for seconds in self._pace) for name in names}
        total = sum(sums.values()) or 1.0
        return "  ".join(f"{self._clean(name)} {value / total:.0%}" for name, value in sums.items())

    def _left(self, step: int, total: int) -> float:
        pace = self._pace[1:] or self._pace if len(self._pace) < _PACE_STEPS else self._pace  # the first step warms caches up
        return sum(sum(seconds.values()) for seconds in pace) / len(pace) * max(0, total - step)

    def _clean(self, text: str) -> str:
        return visible(redact(text), ascii_only=self._ascii)

    def _say(self, text: str, prefix: str, style: str) -> None:
        if self._live:
            self._console.print(Text.assemble((prefix, style), self._clean(text)))
        else:
            self._line(prefix + self._clean(text))

    def _line(self, text: str) -> None:
        # past rich, which would fold long lines at a width a log file does not have
        self._console.file.write(text.replace("\n", "\n  ") + "\n")
        self._console.file.flush()


def _row(*parts: str | tuple[str, str]) -> Text:
    """A line that is cut at the screen's edge; rich's own ellipsis would break a terminal that is not UTF-8."""
    text = Text.assemble(*parts)
    text.no_wrap, text.overflow = True, "crop"
    return text


def sparkline(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """The values as `width` bars at most, each the mean of its share of them, scaled between their extremes."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [index * len(values) // count for index in range(count + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in pairwise(edges)]
    bars, low, span = _ASCII_BARS if ascii_only else _BARS, min(means), max(means) - min(means)
    return "".join(bars[round((mean - low) / span * (len(bars) - 1))] if span > 0 else bars[0] for mean in means)


def bar(share: float, width: int, ascii_only: bool = False) -> str:
    """A progress bar of fixed width for a share from 0 to 1."""
    full = round(min(1.0, max(0.0, share)) * width)
    return ("#" if ascii_only else "━") * full + ("-" if ascii_only else "╌") * (width - full)


def clock(seconds: float) -> str:
    """Seconds as 0:22, 12:05, 3:04:05 or 2d 3h."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
