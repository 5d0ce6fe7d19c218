"""What a run stands on before its first step: rows, plan, model, data and run directory, in the order in which they can fail cheaply.

Owns that order, and the run's outcome whatever happens. What is done with it all is trainer.py's.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from gemma_grpo import distributed, watchdog
from gemma_grpo.config import GRPOConfig, dump_recipe
from gemma_grpo.data.prompts import order
from gemma_grpo.grpo import preflight, resuming
from gemma_grpo.grpo.beside import device_record
from gemma_grpo.grpo.judges import Judges
from gemma_grpo.grpo.progress import StepUnderWay
from gemma_grpo.grpo.setup import TRAINED, Rows, build_training_data, load_rows, reward_weights
from gemma_grpo.grpo.update import PolicyUpdater
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.memory import TokenBudget
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.monitor.shadow import ShadowRun
from gemma_grpo.monitor.terminal import ProgressView
from gemma_grpo.planner import Plan
from gemma_grpo.profile.recorder import Profiler
from gemma_grpo.rollout.engine import RolloutEngine
from gemma_grpo.rollout.local import LocalEngine
from gemma_grpo.rollout.shared import AskedByMain, SharedEngine
from gemma_grpo.rollout.vllm import ServedEngine
from gemma_grpo.shapes import known_shapes
from gemma_grpo.stopping import Stopped, interruptible, listening
from gemma_grpo.types import Prompt

PROBE_PROMPTS = 8
"""What a float16 base must hold with headroom before anything is trained."""


class Preparation:
    """A trainer's own settings, and what is made of them once."""

    def _set_up(self, config: GRPOConfig, dataset: Any, reward: Any, view: Any) -> None:
        self.config = config
        self.view = view if view is not None else ProgressView()
        self._dataset = config.dataset if dataset is None else dataset
        self._function = reward  # or functions by name
        self.code: dict[str, Any] = {}  # for run.json: the file that functions by name came from, and its hash
        self.weights = reward_weights(reward, config)
        self._run: RunDirectory | None = None
        self._rows: Rows | None = None
        self._prepared, self._for_reward_alone, self._may_go_on = False, False, False
        self._ranks: int | None = None  # how many there are, once they have come together
        self._profiler: Profiler | None = None
        self._served: ServedEngine | None = None
        self.step = 0
        self._begun: StepUnderWay | None = None
        self._alerted = False
        self._waited = 0.0

    def plan(self, card: str | None = None) -> Plan:
        """What this run will hold in memory, phase by phase, and whether it fits here or on a named card such as "t4"; loads no model."""
        rewards = {*(() if callable(self._function) else self.weights), *((TRAINED,) if self._for_reward_alone else ())}
        recorded = {} if self._run is None else self._run.read_run().get("plan", {})
        num_prompts = len(self.data.prompts) if self._prepared else None
        return replace(preflight.plan_for(self.config, rewards, recorded, card, ranks=self._ranks), num_prompts=num_prompts)

    @property
    def run(self) -> RunDirectory:
        """The run directory; there once training or evaluation has begun."""
        if self._run is None:
            raise ValueError("this trainer has no run directory yet. Call train() first, or GRPOTrainer.from_run(folder).")
        return self._run

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return self.run.path

    @contextmanager
    def _taking_part(self) -> Iterator[None]:
        """As one of the ranks that a launcher started, or alone. Raises ValueError where there are more ranks than work."""
        with distributed.joined(self.config.ranks.timeout_seconds):
            self._ranks = distributed.world()
            if self._prepared and self.model.sharded is not None:
                raise distributed.RankError(distributed.PARTED)
            prompts = self.config.prompts_per_step
            if distributed.world() > prompts:
                raise ValueError(
                    f"a step has {prompts} prompts (batch_size x gradient_accumulation_steps), and there are {distributed.world()} ranks: "
                    f"some would have nothing to do. Start at most {prompts}, or raise gradient_accumulation_steps."
                )
            if not distributed.is_main():
                self.view = ProgressView.silent()
            if distributed.world() == 1 and self.config.gpus > 1:
                how = f"start the script by torchrun --nproc-per-node {self.config.gpus}, or use `gemma-grpo train`"
                self.view.warn(f"gpus is {self.config.gpus}, and this process works alone: {how}.")
            yield

    @contextmanager
    def _running(self, *, resume: bool, force: bool) -> Iterator[None]:
        """Everything a run needs, in the order in which it can fail cheaply; the outcome in run.json whatever happens."""
        self._check_may_run()  # before anything that would write its outcome: a run that is over stays what it is
        watchdog_settings = self.config.watchdog.model_dump()
        with self.view, listening(self.config.max_minutes), watchdog.watching(self._late, **watchdog_settings):
            try:
                with interruptible(), watchdog.phase("loading", self.config.model_name):
                    if self._run is None:
                        self._open_run(resume=resume, force=force)
                    else:
                        self._reopen()
                    self._prepare(force=force)
                distributed.agree(resuming.fingerprint(self.data), "dataset")
                distributed.agree(json.dumps(dict(self.model.checksums), sort_keys=True), "base model")
                if resume:
                    resuming.check_data(self.run, self.data, self.config.dataset)
                resuming.check_base(self.run, self.config.model_name, self.model.checksums)
                self.run.event("start", resume=resume, **device_record(self.model.device))
                with self._serving():
                    yield
            except BaseException as error:
                if self._run is not None:
                    self.run.ended(self.step, error)
                    # what was given from Python, rows or functions, the recipe does not hold
                    if isinstance(error, Stopped) and isinstance(self._dataset, str) and self._function is None:
                        verb = "train-reward" if self._for_reward_alone else "train"
                        self.view.note(f"gemma-grpo {verb} {shlex.quote(str(self.run.recipe))} --resume goes on with this run")
                raise
            else:
                self.run.ended(self.step)
            finally:
                if self._run is not None:
                    self.run.close()

    def _forget(self) -> None:
        """Begin with what is on the disk: what is in memory may be in the middle of a step."""
        self.run.close()
        self.config = self.config.model_copy(update={"output_dir": str(self.run.path)})
        for name in ("model", "engine", "data", "judges", "updater", "stepper", "rewards", "keeper", "lookout"):
            vars(self).pop(name, None)
        self._run, self._begun, self._alerted = None, None, False
        self._prepared, self._may_go_on, self.step = False, False, 0

    def _check_may_run(self) -> None:
        if self._run is not None and not self._may_go_on:
            raise ValueError(
                f"this trainer's run {self.run.path} has begun. train(resume_from_checkpoint=True) goes on with it; "
                "for another run make a new GRPOTrainer with another output_dir."
            )

    def _reopen(self) -> None:
        self._run, self._may_go_on = RunDirectory.open(self.run.path), False
        self._run.update_run(status="running", ended=None, error=None)

    def _open_run(self, *, resume: bool, force: bool) -> None:
        config = self.config
        self._read_rows(force=force or resume)  # a run that goes on is planned with what it recorded
        if not distributed.is_main():
            self._shadow_run(resume=resume, force=force)
            return
        if resume:
            self._run, notes = resuming.opened_run(config)
            self._run.update_run(status="running", ended=None, error=None, **self.code)
            self._warn(*notes)
            distributed.copy_from_main(self._run.path, self._run.path, resuming.files_to_go_on(self._run))
            return
        RunDirectory.check(path := preflight.run_path(config))
        self._prepare(force=force)
        info = preflight.run_info(config, self.data, self.precision, self.plan()) | self.code
        adapter = sum(weight.numel() * weight.element_size() for weight in self.model.adapter_parameters("policy").values())
        needed = preflight.bytes_to_write(config, adapter, 0 if self._for_reward_alone else self.total_steps)
        self._run = RunDirectory.create(path, dump_recipe(config), info, needed_bytes=needed)

    def _shadow_run(self, *, resume: bool, force: bool) -> None:
        """What `_open_run` does, on a rank that does not write."""
        path = ShadowRun.place()
        if resume:
            distributed.copy_from_main(None, path, ())
            self._run = ShadowRun.open(path)
            return
        self._prepare(force=force)
        info = preflight.run_info(self.config, self.data, self.precision, self.plan())
        self._run = ShadowRun.create(path, dump_recipe(self.config), info)

    def _prepare(self, *, force: bool) -> None:
        """Plan the memory, load the model, tokenise the data, lay out the steps; once."""
        if self._prepared:
            return
        config, self._ranks = self.config, distributed.world()
        rows = self._read_rows(force=force)
        if self._must_train_reward:
            preflight.check_reward_can_be_had(rows, config)
        if not callable(self._function):
            preflight.check_programs_can_be_run(self.weights)
        plan = self.plan()
        preflight.refuse_unless_it_fits(plan, force=force)
        self.view.note(plan.summary)
        preflight.hold_to_limit(config)
        self.view.phase("loading", config.model_name)
        self.model = Gemma.load(
            config.model_name,
            lora=config.lora,
            precision=config.precision,
            quantization=config.quantization,
            seed=config.seed,
            sharding=self._sharding(plan),
        )
        self.judges = Judges(self.model, config)
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.model.budget = TokenBudget(plan.token_budget)
        self.engine = self._engine(plan.kv_token_budget)
        self.data = build_training_data(rows, self.model, config)
        # a run that goes on keeps the divisor it began with, whatever its first prompts would say now
        recorded = {} if self._run is None else self._run.read_run().get("precision", {})
        probes = [prompt.token_ids for prompt in self.data.prompts[:PROBE_PROMPTS]]
        probed = self.model.fit_precision(probes, divisor=recorded.get("divisor"))
        self.precision = {"dtype": str(self.model.dtype).removeprefix("torch."), "quantization": config.quantization, **probed}
        self.steps_per_epoch = math.ceil(len(self.data.prompts) / config.prompts_per_step)
        steps = math.ceil(config.epochs * self.steps_per_epoch)
        self.total_steps = steps if config.max_steps is None else min(steps, config.max_steps)
        self.updater = PolicyUpdater(self.model, config, self.total_steps)
        if self._must_train_reward:
            preflight.check_pairs_are_left(rows, self.data, config)
        self._prepared = True

    def _sharding(self, plan: Plan) -> Literal["none", "layers", "whole"]:
        """As planned, where there are ranks to share the base out to. Raises RankError where their cards lead to other plans."""
        if distributed.world() == 1 or not plan.sharding.active:
            found: Literal["none", "layers", "whole"] = "none"
        else:
            found = "whole" if plan.sharding.whole_while_sampling else "layers"
        plans = distributed.gather(found, "planning")
        if len(set(plans)) > 1:
            each = ", ".join(f"rank {number} {one}" for number, one in enumerate(plans))
            raise distributed.RankError(f"the ranks' memory leads to different plans for sharing out the base: {each}. Set sharding.")
        return found

    def _engine(self, kv_tokens: int | None) -> RolloutEngine:
        if not self.config.serving.urls:
            return SharedEngine(LocalEngine(self.model, kv_tokens))
        if distributed.is_main():
            given, told = self.config.serving, self._tell_of_replicas
            self._served = ServedEngine(self.model, given, self._versions_folder, report=told, upcoming=self._coming_prompts)
        return AskedByMain(self._served)

    def _versions_folder(self) -> Path:
        """This run's alone: several may have been given one folder for all."""
        path, given = self.run.path.resolve(), self.config.serving.adapters
        return path / "serving" if given is None else Path(given) / f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """Whatever replicas are asked inside, nothing is left running behind it."""
        try:
            yield
        finally:
            if self._served is not None:
                self._served.close()

    def _tell_of_replicas(self, what: str, text: str, fields: Mapping[str, Any]) -> None:
        self.run.event("serving", what=what, **fields)
        if what == "back":
            self.view.note(text)
        else:
            self._warn(text)

    def _prompts_of_step(self, step: int) -> Sequence[Prompt]:
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.config.prompts_per_step
        return order(self.data.prompts, self.config.seed, epoch)[start : start + self.config.prompts_per_step]

    def _coming_prompts(self, step: int) -> Sequence[Prompt]:
        return self._prompts_of_step(step) if step < self.total_steps else ()

    def _read_rows(self, *, force: bool) -> Rows:
        """The dataset's rows, read once. A released model's size is known without asking anybody: what cannot fit reads none."""
        if self._rows is None:
            if self.config.model_name in known_shapes():
                preflight.refuse_unless_it_fits(self.plan(), force=force)
            self._rows = load_rows(self._dataset, self.config.data.source, strict=self.config.data.strict)
        return self._rows

    @property
    def _must_train_reward(self) -> bool:
        return (TRAINED in self.weights or self._for_reward_alone) and self.config.reward_model.path is None

    def _warn(self, *texts: str) -> None:
        for text in texts:
            self.run.event("warn", text=text)
            self.view.warn(text)

    def _late(self, text: str, stack: Sequence[str]) -> None:
        """From the watchdog's thread."""
        self.view.warn(text)  # first: a log that cannot be written must not keep it from being said
        if self._run is not None:
            self._run.event("late", text=text, stack=list(stack))
