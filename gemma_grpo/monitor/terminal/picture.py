"""The run as one picture: rows that fit a width and a height, whatever they are.

Reward comes first; the loss is a detail, because GRPO's loss says nothing about progress. Each row has a rank: where the height does not
hold them all, those of the highest rank go first, and the reward and the alarms last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

from gemma_grpo.escapes import visible
from gemma_grpo.monitor.run_files import Record
from gemma_grpo.monitor.terminal.drawing import bar, clock, cut, fold, sparkline
from gemma_grpo.monitor.terminal.seen import JudgeTraining, Seen
from gemma_grpo.monitor.terminal.witnesses import readings, step_of
from gemma_grpo.types import ScoredGroup, StepRecord

Part = tuple[str, str]
"""Text and its style: bold, dim, a colour, or bold and a colour."""

SIDE_BY_SIDE = 130
"""Cells from which the numbers stand beside the last group."""
_LABEL = 12
_MOST_LINES = 8
"""Of one reply."""
_REWARD, _ALARM, _ALARM_TEXT, _PROGRESS, _WARNING, _PHASE, _WITNESS, _REPLY, _PROMPT, _LEFT, _TIME, _PARTS, *_REST = range(17)
_KL, _LENGTH, _ENTROPY, _MORE, _DETAILS = _REST
_TONES = {1: "green", -1: "red", 0: "dim"}
_LEVELS = {"alert": "bold red", "warn": "yellow", "note": "cyan"}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the picture."""

    parts: tuple[Part, ...]
    rank: int
    """How soon it is left out."""

    @property
    def text(self) -> str:
        """Without its styles."""
        return "".join(text for text, _ in self.parts)


def picture(seen: Seen, width: int, height: int, *, ascii_only: bool, now: float) -> list[Row]:
    """At most `height` rows of at most `width` cells. `now` is the clock of seen.phase_started."""
    page = _Page(seen, width, ascii_only, now)
    rows = page.rows(1)
    spare = height - len(rows)
    if width >= SIDE_BY_SIDE:
        spare += len(page.numbers())  # the last group has the room beside them
    if seen.group is not None and spare >= 3:
        rows = page.rows(min(_MOST_LINES, 1 + spare // 3))
    kept = sorted(range(len(rows)), key=lambda index: (rows[index].rank, index))[: max(0, height)]
    return [_fitted(rows[index], width, ascii_only) for index in sorted(kept)]


class _Page:
    def __init__(self, seen: Seen, width: int, ascii_only: bool, now: float) -> None:
        self.seen, self.width, self.ascii, self.now = seen, width, ascii_only, now

    def rows(self, lines: int) -> list[Row]:
        """Everything there is to say, with so many lines for each text of the last group."""
        seen = self.seen
        if seen.record is None:
            training = self.judge_training(seen.training) if seen.training else []
            return [*self.phase(), *training, *self.reward(None), *self.alarms(), *self.warnings(lines), *self.witnesses(self.width)]
        top = [*self.phase(), *self.progress(seen.record), *self.reward(seen.record), *self.alarms(), *self.warnings(lines)]
        if self.width < SIDE_BY_SIDE or seen.group is None:
            return [*top, *self.numbers(self.width), *(self.group(seen.group, self.width, lines) if seen.group else ())]
        left = self.width // 2 - 2
        return [*top, *self._beside(self.numbers(left), self.group(seen.group, self.width - left - 2, lines), left)]

    # ---- what is always there

    def phase(self) -> list[Row]:
        seen = self.seen
        if not seen.phase or seen.over:
            return []
        within = f" of about {clock(seen.expected)}" if seen.expected else ""
        spent = f"  {clock(self.now - seen.phase_started)}{within}"
        return [_row(_PHASE, (f" {cut(self._clean(seen.phase), self.width - len(spent) - 1, self.ascii)}", "bold"), (spent, "dim"))]

    def judge_training(self, now: JudgeTraining) -> list[Row]:
        left = "" if now.left is None else f"  ETA {clock(now.left)}"
        done = f" {bar(now.update / max(now.total, 1), self._bar_width(), self.ascii)}  "
        numbers = f"pair accuracy {now.accuracy:.1%}  loss {now.loss:.3f}"
        return [
            _row(_PROGRESS, (done, ""), (f"{now.adapter} adapter {now.update}/{now.total}", ""), (left, "bold")),
            self._labelled(now.adapter, _REWARD, (numbers, "")),
        ]

    def progress(self, record: StepRecord) -> list[Row]:
        total = self.seen.total_steps
        done = f" {bar(record.step / max(total, 1), self._bar_width(), self.ascii)}  step {record.step}/{total}"
        if self.seen.over:
            return [_row(_PROGRESS, (done, ""))]
        left = self.seen.pace.left(record.step, total)
        cells: list[tuple[Part, ...]] = [((f"{name} ", "dim"), (clock(seconds), "")) for name, seconds in left.parts.items()]
        cells += [((f"unknown yet: {', '.join(left.unknown)}", "dim"),)] if left.unknown else []
        first = _row(_PROGRESS, (done, ""), (f"  ETA {clock(left.seconds)}", "bold"))
        return [first, *self._flow("ETA", cells, self.width, _LEFT)]

    def reward(self, record: StepRecord | None) -> list[Row]:
        values = self.seen.curves.get("reward", ())
        if record is None or "reward" not in record.metrics or not values:
            return [] if record is None else [self._labelled("reward", _REWARD, ("no reply of this step could be scored", "bold red"))]
        spread = f" {'+-' if self.ascii else '±'} {record.metrics.get('reward_std', 0.0):.3f}  "
        since = f"  first {values[0]:.3f} ({values[-1] - values[0]:+.3f})"
        value = f"{record.metrics['reward']:.3f}"
        line = sparkline(values, self.width - _LABEL - len(value + spread + since), self.ascii)
        return [self._labelled("reward", _REWARD, (value + spread, "bold green"), (line, ""), (since, "dim"))]

    def alarms(self) -> list[Row]:
        alarms = self.seen.alarms
        if not alarms:
            return [self._labelled("alarms", _ALARM, ("none", "dim"))] if self.seen.last_look else []
        counts = ", ".join(f"{n} {level}" for level in _LEVELS if (n := sum(alarm.get("level") == level for alarm in alarms)))
        said = f"{len(alarms)} ({counts}); {self._alarm(alarms[-1])}"
        style = _LEVELS.get(str(alarms[-1].get("level")), "yellow")
        first, *others = self._folded("alarms", said, 5, style, (_ALARM, _ALARM_TEXT))
        earlier = [self._labelled("", _MORE, (self._cut(self._alarm(one)), "dim")) for one in alarms[-2:-5:-1]]
        return [first, *others, *earlier]

    def warnings(self, lines: int) -> list[Row]:
        if not self.seen.warnings:
            return []
        said = f"{self.seen.warnings}; last: {self.seen.last_warnings[-1]}"
        rows = self._folded("warnings", said, min(3, lines), "yellow", (_WARNING, _MORE))
        earlier = self.seen.last_warnings[-2 : -1 - lines // 2 : -1] if lines > 1 else ()
        return [*rows, *(self._labelled("", _MORE, (self._cut(text), "dim")) for text in earlier)]

    # ---- numbers

    def numbers(self, width: int | None = None) -> list[Row]:
        """Witnesses, curves and times."""
        width, record = width or self.width // 2, self.seen.record
        if record is None:
            return []
        m = record.metrics
        clipped = f" ({m['completions/clipped_ratio']:.0%} cut off)" if "completions/clipped_ratio" in m else ""
        times = [((f"{name} ", "dim"), (f"{share:.0%}", "")) for name, share in self.seen.pace.shares().items()]
        names = ("loss", "grad_norm", "learning_rate", "beta", "frac_reward_zero_std", "rollbacks")
        details = [((f"{name} {m[name]:.3g}", "dim"),) for name in names if name in m]
        parts = {name.split("/")[1]: value for name, value in m.items() if name.startswith("rewards/") and name.endswith("/mean")}
        return [
            *self.witnesses(width),
            *self._flow("parts", _parts(parts) if len(parts) > 1 else (), width, _PARTS),
            *self._curve("KL", "kl", "{:.4f} nat/token", width, _KL),
            *self._curve("length", "completions/mean_length", "{:.1f} tokens" + clipped, width, _LENGTH),
            *self._curve("entropy", "entropy", "{:.3f} nat/token", width, _ENTROPY),
            *self._flow("time", times, width, _TIME),
            *self._flow("details", details, width, _DETAILS),
        ]

    def witnesses(self, width: int) -> list[Row]:
        found = readings(self.seen.first_look, self.seen.last_look)
        cells = [((f"{one.title} ", "dim"), (one.value, ""), (f" {one.change}" if one.change else "", _TONES[one.tone])) for one in found]
        at = step_of(self.seen.last_look)
        return self._flow("witnesses", [((f"step {at}:", "dim"),), *cells] if cells else [], width, _WITNESS)

    def _curve(self, label: str, metric: str, pattern: str, width: int, rank: int) -> list[Row]:
        values = self.seen.curves.get(metric, ())
        if not values:
            return []
        value = pattern.format(values[-1])
        line = sparkline(values, min(40, width - _LABEL - len(value) - 2), self.ascii)
        return [self._labelled(label, rank, (value + "  ", ""), (line, "dim"))]

    # ---- the last group

    def group(self, scored: ScoredGroup, width: int, lines: int) -> list[Row]:
        """Prompt, best and worst completion, and what each of their rewards is made of."""
        ranked = sorted((reward, index) for index, reward in enumerate(scored.rewards) if reward is not None)
        if not ranked:
            return []
        last_turn = scored.group.prompt.messages[-1]["content"] if scored.group.prompt.messages else ""
        rows = self._folded("prompt", self._one_line(last_turn), lines, "", (_PROMPT, _MORE), width)
        for name, style, (reward, index) in (("best", "green", ranked[-1]), ("worst", "red", ranked[0])):
            text = self._one_line(scored.group.completions[index].text) or "(nothing)"
            first, *others = self._folded("", text, lines, "", (_REPLY, _MORE), width)
            label = (f" {name:5}{reward:5.2f} "[:_LABEL].ljust(_LABEL), style)
            rows += [Row((label, *first.parts[1:]), first.rank), *others]
            rows += self._flow("", _parts({part: values[index] for part, values in scored.reward_parts.items()}), width, _PARTS)
        return rows

    # ---- rows of one kind

    def _beside(self, left: Sequence[Row], right: Sequence[Row], width: int) -> list[Row]:
        """Two columns, the left one of `width` cells; a row is as important as its more important half."""
        rows = []
        for n in range(max(len(left), len(right))):
            one, other = (column[n] if n < len(column) else None for column in (left, right))
            parts = _fitted(one, width, self.ascii).parts if one else ()
            gap = (" " * (width + 2 - sum(cell_len(text) for text, _ in parts)), "")
            ranks = [row.rank for row in (one, other) if row]
            rows.append(Row((*parts, gap, *other.parts) if other else parts, min(ranks)))
        return rows

    def _labelled(self, label: str, rank: int, *parts: Part) -> Row:
        return _row(rank, (f" {label}".ljust(_LABEL), "dim"), *parts)

    def _folded(self, label: str, text: str, lines: int, style: str, ranks: tuple[int, int], width: int | None = None) -> list[Row]:
        """A text on several rows; the first has the first rank, those after it the second."""
        folded = fold(self._clean(text), max(1, (width or self.width) - _LABEL), lines, self.ascii)
        return [self._labelled("" if n else label, ranks[min(n, 1)], (line, style)) for n, line in enumerate(folded)]

    def _flow(self, label: str, cells: Iterable[tuple[Part, ...]], width: int, rank: int) -> list[Row]:
        """Cells one after the other, on as many rows as they need."""
        lines: list[list[Part]] = []
        used = 0
        for cell in cells:
            clean = [(self._clean(text), style) for text, style in cell]
            size = sum(cell_len(text) for text, _ in clean)
            if not lines or used + 2 + size > width - _LABEL:
                lines.append(clean)
                used = size
            else:
                lines[-1] += [("  ", ""), *clean]
                used += 2 + size
        return [self._labelled("" if n else label, rank, *line) for n, line in enumerate(lines)]

    def _alarm(self, alarm: Record) -> str:
        return f"{alarm.get('level')} at step {alarm.get('step')}: {alarm.get('text')}"

    def _cut(self, text: str) -> str:
        return cut(self._clean(text), self.width - _LABEL, self.ascii)

    def _one_line(self, text: str) -> str:
        return " ".join(text.split())

    def _clean(self, text: str) -> str:
        return visible(text, lines=False, ascii_only=self.ascii)

    def _bar_width(self) -> int:
        return max(4, min(60, self.width // 3))


def _row(rank: int, *parts: Part) -> Row:
    return Row(parts, rank)


def _parts(values: Mapping[str, float | None]) -> list[tuple[Part, ...]]:
    """Raw rewards by name; the many rules that most replies keep to, which are 0, only counted."""
    shown = {name: "not scored" if value is None else f"{value:.3f}" for name, value in values.items() if value is None or value}
    cells: list[tuple[Part, ...]] = [((f"{name} ", "dim"), (value, "")) for name, value in shown.items()]
    others = len(values) - len(shown)
    return [*cells, ((f"{others} other{'s' if others > 1 else ''} 0", "dim"),)] if others else cells


def _fitted(row: Row, width: int, ascii_only: bool) -> Row:
    """Cut at the edge; nothing in it is obeyed, wherever it came from."""
    parts: list[Part] = []
    room = width
    for text, style in row.parts:
        shown = visible(text, lines=False, ascii_only=ascii_only)
        size = cell_len(shown)
        parts.append((shown if size <= room else set_cell_size(shown, room), style))
        room -= min(room, size)
    return Row(tuple(parts), row.rank)
