"""A plan as data and as a screen: what each phase holds, what was decided, whether it fits, and what would help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemma_grpo.cards import GIB, Card
from gemma_grpo.planner.phases import PARTS, Phase
from gemma_grpo.planner.terms import Sharding

ERROR = 0.1
"""The largest difference from a measured peak that the tests allow (tests/test_real_sizes.py)."""
_COLUMN = {"loading": "load", "reward training": "train rw", "reference": "ref", "evaluation": "eval"}
"""Phase -> head of its column, where its name would make the table wider than 80 characters."""


@dataclass(frozen=True)
class Suggestion:
    """A change that lowers the peak."""

    change: str
    """A setting as key=value, or words for a larger card."""
    saves_bytes: int
    """Of the peak at the smallest budgets; 0 for a larger card, which saves nothing."""
    fits: bool
    """Whether it alone is enough."""


@dataclass(frozen=True)
class Plan:
    """What a run will hold, phase by phase. `str(plan)` is the screen."""

    model_name: str
    card: Card
    precision: str
    """Of the base on that card: fp32, bf16 or fp16_rescaled, followed by nf4 where the linear layers are quantised."""
    lora: str
    sharding: Sharding
    limit_bytes: int
    token_budget: int
    """Tokens of one forward (and backward) pass."""
    kv_token_budget: int
    """Tokens of keys and values held while sampling."""
    one_completion: int
    """Tokens of one completion after its prompt, both as long as allowed: the least that a pass or a cache can hold."""
    reduced: tuple[str, ...]
    """Budgets that were made smaller so that the run fits."""
    phases: tuple[Phase, ...]
    two_copies_bytes: int
    """What two unquantised copies of the whole checkpoint, policy and reference, would take before anything is computed."""
    batch_size: int
    num_generations: int
    gradient_accumulation_steps: int
    num_prompts: int | None
    suggestions: tuple[Suggestion, ...] = ()

    @property
    def peak(self) -> Phase:
        """The phase that holds most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        """Whether no phase holds more than the limit."""
        return self.peak.total <= self.limit_bytes

    @property
    def product(self) -> str:
        """The product that batch_size alone does not tell."""
        prompts = self.batch_size * self.gradient_accumulation_steps
        return (
            f"{self.batch_size} prompts x {self.num_generations} completions x {self.gradient_accumulation_steps} accumulation"
            f" = {prompts * self.num_generations} completions per update"
        )

    @property
    def summary(self) -> str:
        """One line: peak, limit, verdict, budgets."""
        verdict = "fits" if self.fits else "DOES NOT FIT"
        return (
            f"memory: about {_gib(self.peak.total)} GiB at its peak ({self.peak.name}) of {_gib(self.limit_bytes)} GiB: {verdict}; "
            f"{self.token_budget} tokens a pass, {self.kv_token_budget} tokens of keys and values; {self.precision} on {self.card.name}"
            f"{self._shared_out}"
        )

    @property
    def _shared_out(self) -> str:
        """How the base is shared out, after what comes before; empty where it is not."""
        how = "whole while sampling" if self.sharding.whole_while_sampling else "layer by layer, in each step of sampling too"
        return f"; its layers shared out over {self.sharding.ranks} ranks, gathered {how}" if self.sharding.active else ""

    @property
    def refusal(self) -> str:
        """Why a run is refused and what would help, one sentence first; empty for a plan that fits."""
        if self.fits:
            return ""
        above = self.peak.total - self.limit_bytes
        first = (
            f"about {_gib(self.peak.total)} GiB are needed in {self.peak.name}, {_gib(above)} GiB above the limit of "
            f"{_gib(self.limit_bytes)} GiB on {self.card.name}."
        )
        last = "`gemma-grpo plan` shows the whole plan; --force (in Python force=True) runs all the same."
        return "\n".join([first, *_suggestion_lines(self.suggestions), last])

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values, sizes in bytes."""
        return {
            "model": self.model_name,
            "card": {**vars(self.card)},
            "precision": self.precision,
            "sharding": vars(self.sharding),
            "limit_bytes": self.limit_bytes,
            "token_budget": self.token_budget,
            "kv_token_budget": self.kv_token_budget,
            "reduced": list(self.reduced),
            "phases": {phase.name: {**phase.parts, "total": phase.total} for phase in self.phases},
            "peak": {"phase": self.peak.name, "bytes": self.peak.total},
            "fits": self.fits,
            "two_copies_bytes": self.two_copies_bytes,
            "prompts_per_update": self.batch_size * self.gradient_accumulation_steps,
            "completions_per_update": self.batch_size * self.gradient_accumulation_steps * self.num_generations,
            "updates_per_epoch": self._updates_per_epoch(),
            "suggestions": [vars(suggestion) for suggestion in self.suggestions],
        }

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._table(), "", *self._verdict(), *self._counts()])

    def _head(self) -> list[str]:
        nominal = ", nominal" if self.card.nominal else ""
        return [
            f"{self.model_name}, {self.lora}, base in {self.precision}{self._shared_out}",
            f"card: {self.card.name}, {_gib(self.card.usable_bytes)} GiB usable{nominal}; limit {_gib(self.limit_bytes)} GiB",
            self.product,
        ]

    def _table(self) -> list[str]:
        rows = [("GiB at peak of", *(_COLUMN.get(phase.name, phase.name) for phase in self.phases))]
        rows += [(part, *(_gib(phase.parts[part]) for phase in self.phases)) for part in PARTS if any(p.parts[part] for p in self.phases)]
        rows.append(("total", *(_gib(phase.total) for phase in self.phases)))
        first = max(len(row[0]) for row in rows)
        widths = [max(len(row[column]) for row in rows) for column in range(1, len(rows[0]))]
        lines = [
            "  ".join([f"{row[0]:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths, strict=True))]) for row in rows
        ]
        return [*lines[:-1], "-" * len(lines[-1]), lines[-1]]

    def _verdict(self) -> list[str]:
        peak, limit = self.peak, self.limit_bytes
        if self.fits:
            lines = [f"fits: about {_gib(peak.total)} GiB in {peak.name}, {_gib(limit - peak.total)} GiB below the limit"]
            if peak.total > (1 - ERROR) * limit:
                lines.append(f"  nearer to the limit than the plan's own error, {ERROR:.0%}: it may run out of memory")
        else:
            lines = [f"DOES NOT FIT: about {_gib(peak.total)} GiB in {peak.name}, {_gib(peak.total - limit)} GiB above the limit"]
            lines += _suggestion_lines(self.suggestions)
        share = "does not fit" if self.two_copies_bytes > limit else "would fit"
        copies = f"two whole copies would take {_gib(self.two_copies_bytes)} GiB before the first token: {share}"
        return [*lines, "one base serves as policy, reference and reward;", f"  {copies}"]

    def _counts(self) -> list[str]:
        lines = [
            f"memory.token_budget: {self.token_budget} tokens a pass{self._remark('token_budget', self.token_budget)}",
            f"memory.kv_token_budget: {self.kv_token_budget} tokens while sampling{self._remark('kv_token_budget', self.kv_token_budget)}",
        ]
        updates = self._updates_per_epoch()
        if updates is not None:
            lines.append(f"{self.num_prompts} prompts: {updates} updates per epoch")
        if self.card.kind == "cuda":
            lines.append("Memory: counted from the code; not yet measured on a GPU.")
        return [*lines, "Time: not known until steps have run."]

    def _remark(self, name: str, tokens: int) -> str:
        """What a reader must know of a budget."""
        if tokens < self.one_completion:
            return f"; one completion at a time, up to {self.one_completion}"
        if name in self.reduced:
            return ", made smaller to fit" if self.fits else ", at its smallest"
        return ""

    def _updates_per_epoch(self) -> int | None:
        per_update = self.batch_size * self.gradient_accumulation_steps
        return None if self.num_prompts is None else -(-self.num_prompts // per_update)


def _suggestion_lines(suggestions: Sequence[Suggestion]) -> list[str]:
    if not suggestions:
        return ["Nothing in these settings would make it fit."]
    width = max(len(suggestion.change) for suggestion in suggestions)
    lines = ["What would help, the most effective first:"]
    for suggestion in suggestions:
        saved = f"saves {_gib(suggestion.saves_bytes)} GiB" if suggestion.saves_bytes else ""
        enough = "enough by itself" if suggestion.fits else "not enough alone"
        lines.append(f"  {suggestion.change:<{width}}  {saved + ', ' if saved else ''}{enough}")
    return lines


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"
