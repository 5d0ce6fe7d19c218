"""A run's profile: seconds by phase beside the floor of that phase, step by step and together; the content of profile.json.

Measures nothing in a step besides the time between steps: a phase's seconds are the step's own (grpo/step.py), read off `clock`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_grpo.config import GRPOConfig
from gemma_grpo.data.chat import judge_suffix_ids, reply_ids
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.profile.advice import advice
from gemma_grpo.profile.ceilings import measure_ceilings, synchronised_clock
from gemma_grpo.profile.work import Arithmetic, Lengths, Work
from gemma_grpo.reward.generative import JUDGE_QUESTION
from gemma_grpo.shapes import ModelShape
from gemma_grpo.types import RolloutGroup, StepRecord

PROFILE = "profile.json"
OTHER = "other"
"""What a step took besides its phases: logs, checkpoints, the display."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One phase of one step, or of several together."""

    seconds: float
    floor: float = 0.0
    """Seconds that the counted work takes at the measured ceilings; 0 where no work of the model's was counted."""
    operations: int = 0
    bytes: int = 0
    tokens: int = 0
    """Sampled in a rollout; read, prompts included and once for each pass, in the other phases."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with what follows from them."""
        return {
            "seconds": self.seconds,
            "floor_seconds": self.floor,
            "ratio": self.seconds / self.floor if self.floor else None,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / self.seconds if self.tokens and self.seconds else None,
            "operations": self.operations,
            "bytes": self.bytes,
        }


def together(parts: Iterable[Measured]) -> Measured:
    """The sum of each of their numbers."""
    rows = [(part.seconds, part.floor, part.operations, part.bytes, part.tokens) for part in parts]
    return Measured(*(sum(column) for column in zip(*rows, strict=True))) if rows else Measured(0.0)


class PhaseWork:
    """The passes of each phase of a step, from its groups. `judges` are the rewards that run the model: name -> with an adapter or not."""

    def __init__(self, model: Gemma, shape: ModelShape, config: GRPOConfig, judges: Mapping[str, bool]) -> None:
        self.config, self.judges, self.tokenizer = config, judges, model.tokenizer
        self.arithmetic = Arithmetic(shape, config.lora, model.head_weight.element_size(), nf4=config.quantization == "nf4")
        self.suffix = len(judge_suffix_ids(model.tokenizer, JUDGE_QUESTION))

    def of(self, groups: Sequence[RolloutGroup], passes: int) -> dict[str, tuple[list[Work], int]]:
        """Phase -> its passes and its tokens. `passes` planning steps were taken."""
        lengths = [Lengths(len(group.prompt.token_ids), tuple(len(one.token_ids) for one in group.completions)) for group in groups]
        sampled, tokens = sum(sum(one.completions) for one in lengths), sum(one.tokens for one in lengths)
        asked = [self._asked(group, one) for group, one in zip(groups, lengths, strict=True)]
        reference_rows = sampled if self.config.kl.placement != "off" else 0
        # the frozen base's verdicts and log-probabilities come from one pass (reward/zero_shot.py)
        shared = False in self.judges.values()
        judged = [
            self.arithmetic.forward(asked, adapter=adapter, head_rows=0 if adapter else reference_rows) for adapter in self.judges.values()
        ]
        alone = reference_rows and not shared
        update = self.arithmetic.update(lengths, recomputed=self.config.gradient_checkpointing)
        return {
            "rollout": (self.arithmetic.rollout(lengths), sampled),
            "reward": (judged, len(judged) * sum(one.tokens for one in asked)),
            "reference": ([self.arithmetic.forward(lengths, adapter=False, head_rows=sampled)] if alone else [], tokens if alone else 0),
            "update": (update * passes, tokens * passes),
        }

    def _asked(self, group: RolloutGroup, lengths: Lengths) -> Lengths:
        """What a judge reads: each completion with its question, and the dataset's reply beside them (reward/shaping.py)."""
        reply = group.prompt.columns.get("chosen")
        shaped = isinstance(reply, str) and self.config.reward_model.shaping != "none"
        beside = (len(reply_ids(self.tokenizer, str(reply))),) if shaped else ()
        return Lengths(lengths.prompt, tuple(length + self.suffix for length in (*lengths.completions, *beside)))


class Profiler:
    """Records a training session; made once the model is loaded, it measures the machine first.

    `started` is when the session began, by time.perf_counter.
    """

    def __init__(self, model: Gemma, work: PhaseWork, started: float) -> None:
        self.work, self.started = work, started
        size = work.arithmetic.forward([], adapter=False, head_rows=1).bytes
        self.ceilings = measure_ceilings(model.device, model.dtype, work.arithmetic.shape, size)
        self.clock = synchronised_clock(model.device)
        self.steps: list[tuple[int, dict[str, Measured]]] = []
        self._earlier: int | None = None
        self._begun = self._last = 0.0

    def begin(self, steps_done: int) -> None:
        """The first step of this session begins, after so many of earlier ones."""
        self._earlier = steps_done
        self._begun = self._last = self.clock()

    def step(self, record: StepRecord, groups: Sequence[RolloutGroup]) -> None:
        """A step is done, its logs and its checkpoint included."""
        now = self.clock()
        wall, self._last = now - self._last, now
        work = self.work.of(groups, int(record.metrics["passes"]))
        measured = {name: self._measured(seconds, *work[name]) for name, seconds in record.seconds.items()}
        measured[OTHER] = Measured(wall - sum(record.seconds.values()))
        self.steps.append((record.step, measured))

    def _measured(self, seconds: float, passes: Sequence[Work], tokens: int) -> Measured:
        floor = sum(self.ceilings.seconds(one) for one in passes)
        return Measured(seconds, floor, sum(one.operations for one in passes), sum(one.bytes for one in passes), tokens)

    def to_dict(self) -> dict[str, Any]:
        """The content of profile.json, as of now. The first step is left out of the sums unless it is the only one: it warms up."""
        now = time.perf_counter()
        counted = self.steps[1:] or self.steps
        phases = {name: together(step[name] for _, step in counted) for name in counted[0][1]} if counted else {}
        total = sum(one.seconds for one in phases.values())
        floor = sum(one.floor for one in phases.values())
        span = [counted[0][0], counted[-1][0]] if counted else []
        begun = self._earlier is not None
        return {
            **self.ceilings.to_dict(),
            "steps": {"earlier": self._earlier or 0, "profiled": len(self.steps), "counted": span},
            "phases": {name: {**one.to_dict(), "share": one.seconds / total} for name, one in phases.items()},
            "total": {"seconds": total, "floor_seconds": floor, "ratio": total / floor if floor else None},
            "outside": {
                "before the steps": (self._begun if begun else now) - self.started,
                "first step, warm-up": sum(one.seconds for one in self.steps[0][1].values()) if len(self.steps) > 1 else 0.0,
                "after the steps": now - self._last if begun else 0.0,
            },
            "session_seconds": now - self.started,
            "advice": self._advice(phases) if phases else "",
            "by_step": [_step(step, parts) for step, parts in self.steps],
        }

    def _advice(self, phases: Mapping[str, Measured]) -> str:
        spent = {name: (one.seconds, one.floor) for name, one in phases.items()}
        return advice(spent, self.work.config, list(self.work.judges))


def _step(step: int, parts: Mapping[str, Measured]) -> dict[str, Any]:
    return {
        "step": step,
        "seconds": {name: one.seconds for name, one in parts.items()},
        "floor_seconds": {name: one.floor for name, one in parts.items() if one.floor},
        "tokens": {name: one.tokens for name, one in parts.items() if one.tokens},
    }
