"""What a checkpoint of a run holds, written and read back, and what is saved when a step fails.

Owns the content: adapter, optimizer, controllers, the step under way, log offsets, and of what model, data and settings they are. How a
folder is written so that nothing is lost is checkpoint.py's, whether a run may go on at all resuming.py's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_grpo import watchdog
from gemma_grpo.checkpoint import ROLLOUT, Checkpoint, CheckpointError, save_checkpoint
from gemma_grpo.grpo.progress import StepUnderWay, from_tensors, to_tensors
from gemma_grpo.grpo.step import Stepper
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.types import Prompt


class Keeper:
    """Saves and restores what `stepper` and its updater have in memory."""

    def __init__(self, run: RunDirectory, stepper: Stepper, origin: Mapping[str, str], keep: int | None) -> None:
        self.run, self.stepper, self.origin, self.keep = run, stepper, dict(origin), keep
        self.saved_step = 0
        """Finished steps in the last checkpoint."""

    def save(self, step: int, under_way: StepUnderWay | None = None) -> Path:
        """A checkpoint of `step` finished steps, and of the next one as far as it has come. Raises CheckpointError."""
        stepper, started = self.stepper, time.perf_counter()
        with watchdog.phase("saving", f"step {step}"):
            optimizer, controllers = stepper.updater.state()
            state = {"controllers": controllers, "num_tokens": stepper.num_tokens, "offsets": self.run.offsets(), "origin": self.origin}
            rollout = None
            if under_way is not None:
                rollout, state["under_way"] = to_tensors(under_way, list(stepper.updater.parameters))
            policy = stepper.model.adapter_files("policy")
            path = save_checkpoint(
                self.run.checkpoints, step, policy=policy, optimizer=optimizer, state=state, rollout=rollout, keep=self.keep
            )
        self.saved_step = step
        self.run.event("checkpoint", step=step, path=path.name, seconds=time.perf_counter() - started, under_way=under_way is not None)
        return path

    def save_after(self, error: BaseException, step: int) -> str | None:
        """What must not be lost when `error` ended the step after `step` finished ones; a sentence when something could not be kept.

        A FloatingPointError is told where the batch lies that it came from, and which weight it comes from if one is not finite.
        """
        under_way = self.stepper.under_way
        try:
            if self.stepper.updater.intact and (step > self.saved_step or under_way is not None):
                path = self.save(step, under_way)
                if isinstance(error, FloatingPointError):
                    error.args = (" ".join([str(error), *self._where_to_look(path)]),)
        except Exception as failure:
            return f"step {step} was not saved: {failure}"
        return None

    def _where_to_look(self, path: Path) -> Iterator[str]:
        broken = self.stepper.model.not_finite()
        if broken is not None:
            yield f"{broken} is not finite."
        if self.stepper.under_way is not None:
            yield f"The step's batch is in {path / ROLLOUT}."

    def restore(self, checkpoint: Checkpoint, prompts: Sequence[Prompt]) -> StepUnderWay | None:
        """Take over a checkpoint; what the step after its finished ones has so far. `prompts` are that step's.

        Raises CheckpointError, with nothing taken over, when it is not of this run.
        """
        self._check_origin(checkpoint)
        stepper, state = self.stepper, checkpoint.state
        under_way = self._under_way(checkpoint, prompts)
        stepper.model.load_adapter("policy", checkpoint.policy)
        stepper.updater.load(checkpoint.optimizer, state["controllers"])
        self.run.truncate(state["offsets"])
        stepper.num_tokens = state["num_tokens"]
        self.saved_step = checkpoint.step
        return under_way

    def _check_origin(self, checkpoint: Checkpoint) -> None:
        origin: Mapping[str, Any] = checkpoint.state.get("origin", {})
        other = [name for name, value in self.origin.items() if origin.get(name) != value]
        if other:
            raise CheckpointError(
                f"{checkpoint.path} is of another run: its {' and '.join(other)} are not this run's. Put this run's own checkpoint back, "
                "or start a new run in another output_dir."
            )

    def _under_way(self, checkpoint: Checkpoint, prompts: Sequence[Prompt]) -> StepUnderWay | None:
        if not checkpoint.rollout:
            return None
        model, facts = self.stepper.model, checkpoint.state["under_way"]
        names, at = list(self.stepper.updater.parameters), {"step": checkpoint.step}
        return from_tensors(checkpoint.rollout, facts, prompts, names, tokenizer=model.tokenizer, device=model.device, **at)
