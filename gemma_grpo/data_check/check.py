"""All findings of one dataset, with the facts they stand on. Owns their order, and what is serious enough to stop at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_grpo.config import GRPOConfig
from gemma_grpo.data.hh_rlhf import LoadedPairs
from gemma_grpo.data.inspection import pair_stats, prompt_stats
from gemma_grpo.data.prompts import LoadedPrompts
from gemma_grpo.data_check.findings import Finding, Level, counted, level_of
from gemma_grpo.data_check.lengths import length_findings, truncation_finding
from gemma_grpo.data_check.personal import excerpt
from gemma_grpo.data_check.repeats import MAX_ROWS, repeat_findings
from gemma_grpo.data_check.rows import SCANNED, CheckedRow, checked_rows
from gemma_grpo.data_check.texts import text_findings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ORDER: tuple[Level, ...] = ("serious", "look", "fine")


@dataclass(frozen=True, slots=True)
class DataReport:
    """What a check found."""

    facts: dict[str, Any]
    """Form, rows, sides of the split, lengths; JSON."""
    findings: tuple[Finding, ...]
    """The serious ones first."""

    @property
    def is_serious(self) -> bool:
        """Whether anything should be mended before training."""
        return any(finding.level == "serious" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON; every text of the data in it is redacted and escaped."""
        return {**self.facts, "serious": self.is_serious, "findings": [finding.to_dict() for finding in self.findings]}


def check_data(loaded: LoadedPairs | LoadedPrompts, config: GRPOConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> DataReport:
    """Everything that is looked for in loaded rows; what the settings' limits cut only with a tokenizer."""
    rows = checked_rows(loaded, config.data.holdout)
    findings = [_dropped(loaded), *repeat_findings(rows), *length_findings(rows), *text_findings(rows)]
    if tokenizer is not None:
        findings.append(truncation_finding(rows, tokenizer, config))
    return DataReport(_facts(loaded, rows), tuple(sorted(findings, key=lambda finding: _ORDER.index(finding.level))))


def _dropped(loaded: LoadedPairs | LoadedPrompts) -> Finding:
    dropped = {reason: count for reason, count in loaded.dropped.items() if count}
    count = sum(dropped.values())
    return Finding("dropped", level_of(count, loaded.rows, 0.1), count, loaded.rows, "rows", (), dropped)


def _facts(loaded: LoadedPairs | LoadedPrompts, rows: Sequence[CheckedRow]) -> dict[str, Any]:
    stats = pair_stats(loaded) if isinstance(loaded, LoadedPairs) else prompt_stats(loaded)
    names = ("form", "rows", "kept", "merged", "conversations", "prompt_words", "chosen_words", "rejected_words")
    return {
        **{name: stats[name] for name in names if name in stats},
        "columns": [excerpt(name) for name in stats.get("columns", ())][:50],
        "sources": counted(row.source for row in rows),
        "rows_held_out": sum(row.held_out for row in rows),
        "places_of_dropped": list(loaded.examples),
        "rows_compared_for_likeness": min(len(rows), MAX_ROWS),
        "rows_with_a_text_not_read_to_its_end": sum(
            any(len(text) > SCANNED for text in (*(message["content"] for message in row.messages), *row.replies)) for row in rows
        ),
    }
