"""The run as plain lines for a log: one for each step, each look and every 20th of a judge's training."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_grpo.monitor.terminal.drawing import clock
from gemma_grpo.monitor.terminal.pace import Pace, Remaining
from gemma_grpo.monitor.terminal.seen import JudgeTraining, Seen
from gemma_grpo.monitor.terminal.witnesses import readings, step_of

_METRICS = (
    ("reward_std", "+- {:.3f}"),
    ("kl", "kl {:.4f}"),
    ("entropy", "entropy {:.2f}"),
    ("completions/mean_length", "length {:.0f}"),
)


def step_line(seen: Seen) -> str:
    """The last step: reward first, no loss, the time's shares, and what is left."""
    record, total = seen.record, seen.total_steps
    if record is None:
        return ""
    parts = [f"step {record.step}/{total}", f"reward {record.metrics.get('reward', 0.0):.3f}"]
    parts += [pattern.format(record.metrics[name]) for name, pattern in _METRICS if name in record.metrics]
    return "  ".join([*parts, f"[{'  '.join(shares(seen.pace))}]", eta(seen.pace.left(record.step, total))])


def look_line(seen: Seen) -> str:
    """The last look, each number with its change since the first."""
    cells = [f"{one.title} {one.value}{f' ({one.change})' if one.change else ''}" for one in readings(seen.first_look, seen.last_look)]
    return "  ".join([f"look at step {step_of(seen.last_look)}", *cells])


def training_line(training: JudgeTraining) -> str:
    """How far a judge's training has come."""
    left = "" if training.left is None else f"  ETA {clock(training.left)}"
    name = f"{training.adapter} adapter {training.update}/{training.total}"
    return f"{name}  pair accuracy {training.accuracy:.1%}  loss {training.loss:.3f}{left}"


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned by spaces, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def shares(pace: Pace) -> list[str]:
    """Each phase's share of the time measured so far."""
    return [f"{name} {share:.0%}" for name, share in pace.shares().items()]


def eta(left: Remaining) -> str:
    """The time left, and what is in it beside the steps."""
    within = [name for name, seconds in left.parts.items() if name != "steps" and round(seconds)]
    return f"ETA {clock(left.seconds)}" + (f" with {', '.join(within)}" if within else "")
