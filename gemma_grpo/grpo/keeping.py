"""What a checkpoint of a run holds, written and read back, and what is saved when a step fails.

Owns the content: adapter, optimizer, controllers, the step under way, log offsets, and of what model, data and settings they are. How a
folder is written so that nothing is lost is checkpoint.py's, whether a run may go on at all resuming.py's.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_grpo import distributed, watchdog
from gemma_grpo.checkpoint import ROLLOUT, Checkpoint, CheckpointError, latest_checkpoint, save_checkpoint, sweep
from gemma_grpo.config import GRPOConfig
from gemma_grpo.disk import DISK
from gemma_grpo.grpo.progress import StepUnderWay, from_tensors, to_tensors
from gemma_grpo.grpo.resuming import origin
from gemma_grpo.grpo.step import Stepper
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.reward.training import Progress, RewardTraining
from gemma_grpo.types import Prompt


class Keeper:
    """Saves and restores what `stepper` and its updater have in memory."""

    def __init__(self, run: RunDirectory, config: GRPOConfig, stepper: Stepper, judges: Iterable[bytes]) -> None:
        """`judges` is all that the trained judges score with, nothing where there are none."""
        self.run, self.stepper, self.keep = run, stepper, config.keep_checkpoints
        self.origin = origin(run, config, stepper.model.checksums)
        digests = b"".join(hashlib.sha256(part).digest() for part in judges)
        if digests:
            self.origin["reward adapter"] = hashlib.sha256(digests).hexdigest()
        self.saved_step = 0
        """Finished steps in the last checkpoint."""

    def save(self, step: int, under_way: StepUnderWay | None = None) -> Path:
        """A checkpoint of `step` finished steps, and of the next one as far as it has come; by rank 0 alone. Raises CheckpointError."""
        if not distributed.is_main():
            self.saved_step = step
            return self.run.checkpoints
        stepper, started = self.stepper, time.perf_counter()
        with watchdog.phase("saving", f"step {step}"):
            optimizer, controllers = stepper.updater.state()
            state = {"controllers": controllers, "num_tokens": stepper.num_tokens, "offsets": self.run.offsets(), "origin": self.origin}
            rollout = None
            if under_way is not None:
                rollout, state["under_way"] = to_tensors(under_way, stepper.model)
            adapters = {"policy": stepper.model.adapter_files("policy")}
            folder, options = self.run.checkpoints, {"rollout": rollout, "keep": self.keep}
            path = save_checkpoint(folder, step, adapters=adapters, optimizer=optimizer, state=state, **options)  # type: ignore[arg-type]
        self.saved_step = step
        self.run.event("checkpoint", step=step, path=path.name, seconds=time.perf_counter() - started, under_way=under_way is not None)
        return path

    def save_after(self, error: BaseException, step: int) -> str | None:
        """What must not be lost when `error` ended the step after `step` finished ones; a sentence when something could not be kept.

        A FloatingPointError is told where the batch lies that it came from, and which weight it comes from if one is not finite.
        """
        under_way = self.stepper.under_way
        try:
            if not self.stepper.updater.intact or self.stepper.half_counted:
                inside = f"the weights are in the middle of step {step + 1}"
                return f"nothing was saved, as {inside}: the last checkpoint is step {self.saved_step}'s"
            if step > self.saved_step or under_way is not None:
                path = self.save(step, under_way)
                if isinstance(error, FloatingPointError):
                    error.args = (" ".join([str(error), *self._where_to_look(path)]),)
        except Exception as failure:
            return f"while step {step} was saved: {failure}"
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
        check_origin(checkpoint, self.origin)
        stepper, state = self.stepper, checkpoint.state
        under_way = self._under_way(checkpoint, prompts)
        stepper.model.load_adapter("policy", checkpoint.adapter("policy"))
        stepper.updater.load(checkpoint.optimizer, state["controllers"])
        self.run.truncate(state["offsets"])
        stepper.num_tokens = state["num_tokens"]
        self.saved_step = checkpoint.step
        return under_way

    def _under_way(self, checkpoint: Checkpoint, prompts: Sequence[Prompt]) -> StepUnderWay | None:
        if not checkpoint.rollout:
            return None
        facts = checkpoint.state["under_way"]
        return from_tensors(checkpoint.rollout, facts, prompts, self.stepper.model, step=checkpoint.step)


class RewardKeeper:
    """Makes the updates of a judge's training, saved now and then and whatever ends them early, and goes on where they ended."""

    def __init__(self, run: RunDirectory, config: GRPOConfig, warn: Callable[[str], None], adapter: str, folder: Path) -> None:
        self.run, self.config, self.warn, self.adapter, self.folder = run, config, warn, adapter, folder

    def train(self, training: RewardTraining, progress: Progress) -> None:
        """All updates that are left. Raises what RewardTraining.run does, and CheckpointError."""
        self._restore(training)
        saved = training.made

        def after_update(update: int, total: int, loss: float, accuracy: float) -> None:
            nonlocal saved
            progress(update, total, loss, accuracy)
            if self.config.save_steps and update % self.config.save_steps == 0:
                self._save(training)
                saved = update

        try:
            training.run(after_update)
        except BaseException:
            if training.made > saved and training.intact:
                try:
                    self._save(training)
                except Exception as failure:  # must not take the place of why it ended
                    self.warn(f"the updates {saved + 1} to {training.made} of {self.adapter!r} were not saved: {failure}")
            raise
        if training.made > saved:
            self._save(training)  # measuring is still to come, and may be stopped

    def _restore(self, training: RewardTraining) -> None:
        sweep(self.folder)
        checkpoint, damaged = latest_checkpoint(self.folder)
        for text in damaged:
            self.warn(f"{text}; using {checkpoint.path.name if checkpoint else 'none'}")
        if checkpoint is None:
            return
        check_origin(checkpoint, self._origin(training))
        training.scorer.model.load_adapter(self.adapter, checkpoint.adapter(self.adapter))
        training.load(checkpoint.step, checkpoint.optimizer, checkpoint.state["controllers"])
        self.warn(f"the training of {self.adapter!r} goes on after update {training.made} of {training.updates}")

    def _save(self, training: RewardTraining) -> None:
        if not distributed.is_main():
            return
        with watchdog.phase("saving", f"update {training.made} of {self.adapter}"):
            optimizer, controllers = training.state()
            adapters = {self.adapter: training.scorer.model.adapter_files(self.adapter)}
            state = {"controllers": controllers, "origin": self._origin(training)}
            keep = self.config.keep_checkpoints
            save_checkpoint(self.folder, training.made, adapters=adapters, optimizer=optimizer, state=state, keep=keep)

    def _origin(self, training: RewardTraining) -> dict[str, str]:
        return origin(self.run, self.config, training.scorer.model.checksums)

    def done(self) -> None:
        """The adapter is written and measured: its checkpoints are no longer needed."""
        if self.folder.is_dir():
            DISK.remove(self.folder)


def check_origin(checkpoint: Checkpoint, expected: Mapping[str, str]) -> None:
    """Raise CheckpointError unless the checkpoint is of this base, these data and these settings."""
    found: Mapping[str, Any] = checkpoint.state.get("origin", {})
    other = [name for name, value in expected.items() if found.get(name) != value]
    if other:
        raise CheckpointError(
            f"{checkpoint.path} is of another run: its {' and '.join(other)} are not this run's. Put this run's own checkpoint back, "
            "or start a new run in another output_dir."
        )
