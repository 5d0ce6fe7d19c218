"""Which numbers of a run are worth a curve, what to call them, and the curve of one of them, of one run or of several overlaid.

Reads the lines of metrics.jsonl and witnesses.jsonl; draws by charts.py. The report and the page show the same charts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from markupsafe import Markup

from gemma_grpo.monitor.run_files import Record, real
from gemma_grpo.monitor.watched import alarm_marks, curves

if TYPE_CHECKING:
    from gemma_grpo.monitor.charts import Chart, Series


@dataclass(frozen=True, slots=True)
class Panel:
    """A number worth a curve: what to call it, its unit and one sentence on how to read it."""

    metric: str
    title: str
    unit: str
    caption: str
    spread: str = ""
    """The number that is the band's half width."""
    watched: bool = False
    """Of the looks at held-out prompts, rather than of the training steps."""

    @property
    def key(self) -> str:
        """Its name among all panels."""
        return f"look:{self.metric}" if self.watched else self.metric


@dataclass(frozen=True, slots=True)
class Lines:
    """What curves are drawn from. Replies in `looks` are not read."""

    name: str
    metrics: Sequence[Record]
    looks: Sequence[Record]


_TRAINING = (
    Panel("reward", "Reward", "reward", "Mean over completions; the band is one standard deviation.", spread="reward_std"),
    Panel("kl", "KL to the reference", "nat / token", "How far the policy has moved from the untouched model."),
    Panel("entropy", "Entropy", "nat / token", "Falling fast means the policy stops exploring."),
    Panel("completions/mean_length", "Length", "tokens", "A rise towards the limit is a usual sign of reward hacking."),
    Panel("completions/clipped_ratio", "Cut off", "share", "Completions that reached the length limit."),
    Panel("beta", "Beta", "1 / nat", "Weight of the KL penalty; the controller moves it."),
    Panel("frac_reward_zero_std", "Groups without a signal", "share", "All completions scored the same: nothing to learn from them."),
    Panel("kl_step", "KL of one step", "nat / token", "To the policy that sampled; above the step limit an update is rolled back."),
    Panel("sampling_gap", "Sampler against trainer", "nat", "Largest difference of their log-probabilities; should be near zero."),
    Panel("grad_norm", "Gradient norm", "", "Before clipping."),
    Panel("loss", "Loss", "", "Near zero by construction; it says nothing about progress. Watch the reward."),
)
_LOOKS = {
    "proxy": ("Reward on held-out prompts", "reward", "What training maximises."),
    "gold": ("Gold", "score", "The true score, which only the miniature world knows."),
    "witness": ("Held-out judge", "log-odds", "A judge of other pairs. It shares the base, and can err with the reward."),
    "lexical": ("Lexical judge", "log-odds", "Words and word pairs, learned from the same other pairs: it errs in another way."),
    "fluency": ("Likelihood under the untouched model", "nat / token", "A sharp fall: replies that the model would not have said."),
    "oddest": ("Least likely token", "nat", "Of each reply, under the untouched model: a few odd words show here first."),
    "strayed": ("Strayed", "share", "Replies more than 0.4 nat per token from the untouched model: rises early where a reward is gamed."),
    "kl_sequence": ("Distance travelled", "nat / reply", "KL to the untouched model."),
    "refusal_harmful": ("Refuses harmful requests", "share", ""),
    "refusal_benign": ("Refuses benign requests", "share", ""),
    "refusal_looks_harmful": ("Refuses requests that only look harmful", "share", ""),
    "length": ("Length on held-out prompts", "tokens", ""),
    "clipped": ("Cut off on held-out prompts", "share", "Replies that reached the length limit."),
    "distinct_2": ("Distinct word pairs", "share", "Of all word pairs; a fall means that replies grow alike."),
}
_WATCHED = tuple(Panel(name, *texts, watched=True) for name, texts in _LOOKS.items())


MOST_BANDS = 2
"""Runs in one chart whose bands can still be told apart."""
_PART = "rewards/"
_CHARTED = {sys.intern(name) for panel in _TRAINING for name in (panel.metric, panel.spread) if name} | {"step"}


def charted(line: Record) -> Record:
    """What charts need of a line of metrics.jsonl: a long run's lines are kept, and hold much else."""
    return {sys.intern(name): value for name, value in line.items() if name in _CHARTED or name.startswith(_PART)}


def training_panels(metrics: Sequence[Record]) -> list[Panel]:
    """Those that any step has a number for; the parts of the reward too, where it has several."""
    parts = sorted({name for line in metrics for name in line if name.startswith(_PART) and name.endswith("/mean")})
    panels = list(_TRAINING)
    if len(parts) > 1:
        panels[1:1] = [
            Panel(name, f"Reward part: {name[8:-5]}", "reward", "Raw value before weighting.", name[:-4] + "std") for name in parts
        ]
    return [panel for panel in panels if any(real(line.get(panel.metric)) is not None for line in metrics)]


def watched_panels(looks: Sequence[Record]) -> list[Panel]:
    """Those that two looks or more have."""
    found = curves(looks)
    return [panel for panel in _WATCHED if panel.metric in found and len(found[panel.metric][0]) > 1]


def draw(panel: Panel, runs: Sequence[Lines], *, hover: bool = False) -> Chart:
    """The curve of one number, a line for each run; alarms marked where it is a look's. With `hover` it holds the numbers, too."""
    from gemma_grpo.monitor.charts import Chart, curve  # matplotlib: not for who only asks which charts there are

    if len(runs) > MOST_BANDS:
        panel = replace(panel, spread="")
    series = [_series(panel, run, label=run.name if len(runs) > 1 else panel.title) for run in runs]
    marks = sorted({place for run in runs for place, _ in alarm_marks(run.looks)}) if panel.watched else []
    svg = curve(series, panel.title, panel.unit, marks=marks, hover=hover)
    return Chart(panel.title, panel.caption, Markup(svg))


def _series(panel: Panel, run: Lines, *, label: str) -> Series:
    from gemma_grpo.monitor.charts import Series

    if panel.watched:
        return Series(label, *curves(run.looks).get(panel.metric, ([], [])))
    numbered = [(step, line) for line in run.metrics if (step := real(line.get("step"))) is not None]
    steps, lines = [step for step, _ in numbered], [line for _, line in numbered]
    spread: list[float | None] | None = None
    if panel.spread and any(panel.spread in line for line in lines):
        spread = [real(line.get(panel.spread)) for line in lines]
    return Series(label, steps, [real(line.get(panel.metric)) for line in lines], spread)


def charts(panels: Sequence[Panel], run: Lines) -> list[Chart]:
    """One chart for each panel."""
    return [draw(panel, [run]) for panel in panels]
