"""GRPOTrainer: the loop. Rollouts, rewards, advantages, update; before it the reward adapter, after it the evaluation.

Owns the order of things and what goes into the run directory. How each part is done is the part's own file.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gemma_grpo import watchdog
from gemma_grpo.checkpoint import Checkpoint, saving
from gemma_grpo.config import GRPOConfig, build_config, dump_recipe, load_recipe
from gemma_grpo.data.prompts import order
from gemma_grpo.grpo import preflight, resuming
from gemma_grpo.grpo.assess import evaluate_policy, judge_warnings, train_and_measure_reward
from gemma_grpo.grpo.explain import CUT_OFF_STEPS, NoSignalError, never_stops, no_signal, step_warnings
from gemma_grpo.grpo.keeping import Keeper, RewardKeeper
from gemma_grpo.grpo.progress import StepUnderWay
from gemma_grpo.grpo.setup import (
    TRAINED,
    ZERO_SHOT,
    Rows,
    build_reward_stack,
    build_training_data,
    given_functions,
    gold_margin,
    known_gold,
    load_rows,
    reward_weights,
    zero_shot_judge,
)
from gemma_grpo.grpo.step import Stepper
from gemma_grpo.grpo.update import PolicyUpdater
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.memory import TokenBudget, release
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.monitor.terminal import ProgressView
from gemma_grpo.planner import Plan, find_shape
from gemma_grpo.profile.recorder import PROFILE, PhaseWork, Profiler
from gemma_grpo.rollout.local import LocalEngine
from gemma_grpo.shapes import known_shapes
from gemma_grpo.stopping import interruptible, listening
from gemma_grpo.types import Prompt, ScoredGroup, StepRecord

GIVEN_ROWS, CALIBRATION = "rows given in Python", "calibration.json"
PROBE_PROMPTS = 8
"""What a float16 base must hold with headroom before anything is trained."""


class GRPOTrainer:
    """Fine-tunes a Gemma 3 on preferences: `GRPOTrainer(model_name=..., dataset=...).train()`.

    Every setting of GRPOConfig is a keyword, nested ones as a mapping or dotted ("kl.beta"). `dataset` may also be rows or a
    datasets.Dataset; `reward` also a function f(prompts, completions, **columns) -> list of float or None, or weights of names that
    `reward_functions` maps to such functions. Wrong settings raise ConfigError at once, all of them together.
    """

    def __init__(
        self, model_name: str | None = None, dataset: Any = None, reward: Any = None, *, reward_functions: Any = None, view: Any = None,
        **settings: Any,
    ) -> None:
        named: dict[str, Any] = {"model_name": model_name, "dataset": dataset if isinstance(dataset, str | None) else GIVEN_ROWS}
        named["reward"] = reward if isinstance(reward, Mapping) else {reward: 1.0} if isinstance(reward, str) else None
        given = {name: value for name, value in named.items() if value is not None}
        self._set_up(build_config({**settings, **given}), dataset, given_functions(reward, reward_functions), view)

    @classmethod
    def from_recipe(
        cls, path: str | Path, overrides: Mapping[str, Any] | None = None, *, reward_functions: Any = None, view: Any = None,
        **settings: Any,
    ) -> GRPOTrainer:
        """A trainer with a recipe's settings, some of them overridden."""
        trainer = cls.__new__(cls)
        trainer._set_up(load_recipe(path, {**(overrides or {}), **settings}), None, reward_functions, view)
        return trainer

    @classmethod
    def from_run(cls, run_dir: str | Path, *, reward_functions: Any = None, view: Any = None) -> GRPOTrainer:
        """The trainer of an existing run, to evaluate or use it; its final adapter is loaded."""
        run = RunDirectory.open(run_dir)
        trainer = cls.from_recipe(run.recipe, {"output_dir": str(run_dir)}, view=view, reward_functions=reward_functions)
        trainer._run = run
        trainer._prepare(force=True)  # what it trained with need not fit where it is only used
        trainer.model.load_adapter("policy", run.adapter)
        trainer._load_reward()
        trainer._build_rewards()
        return trainer

    def _set_up(self, config: GRPOConfig, dataset: Any, reward: Any, view: Any) -> None:
        self.config = config
        self.view = view if view is not None else ProgressView()
        self._dataset = config.dataset if dataset is None else dataset
        self._function = reward  # or functions by name
        self.code: dict[str, Any] = {}  # for run.json: the file that functions by name came from, and its hash
        self.weights = reward_weights(reward, config)
        self._run: RunDirectory | None = None
        self._rows: Rows | None = None
        self._calibration: dict[str, Any] = {}
        self._prepared, self._for_reward_alone = False, False
        self._profiler: Profiler | None = None
        self.step = 0
        self._begun: StepUnderWay | None = None

    # ---- what a user calls

    def plan(self, card: str | None = None) -> Plan:
        """What this run will hold in memory, phase by phase, and whether it fits here or on a named card such as "t4"; loads no model."""
        rewards = {*(() if callable(self._function) else self.weights), *((TRAINED,) if self._for_reward_alone else ())}
        recorded = {} if self._run is None else self._run.read_run().get("plan", {})
        num_prompts = len(self.data.prompts) if self._prepared else None
        return replace(preflight.plan_for(self.config, rewards, recorded, card), num_prompts=num_prompts)

    def train(self, resume_from_checkpoint: bool | None = None, *, force: bool = False, profile: bool = False) -> dict[str, Any]:
        """The whole road: reward adapter (when the reward is the trained judge), GRPO, evaluation. Returns the evaluation.

        With resume_from_checkpoint the run in output_dir goes on after its newest checkpoint; one that is finished is left as it is.
        Raises PreflightError, before anything is loaded, when the plan does not fit; `force` runs all the same. `profile` measures
        this machine and writes profile.json: where the time went, beside what the machine could do.
        """
        started = time.perf_counter()
        done = resuming.finished_run(self.config) if resume_from_checkpoint else None
        if done is not None:
            self._run, steps, evaluation = done
            self.view.note(f"nothing to do: {self.run.path} finished at step {steps}")
            return evaluation
        with self._running(resume=bool(resume_from_checkpoint), force=force), self._profiled(started if profile else None):
            checkpoint = resuming.newest_checkpoint(self.run, self._warn) if resume_from_checkpoint else None
            if resume_from_checkpoint and (self.run.reward / CALIBRATION).is_file():
                self._load_reward()
            elif TRAINED in self.weights and not self._calibration:
                self._train_reward()
            self._build_rewards()
            self._warn(*judge_warnings(self.run, self._calibration, self.stepper.judge, self.data.held_out_prompts or self.data.prompts))
            if resume_from_checkpoint:
                self._go_on_from(checkpoint)
            self._loop()
            self.save_model(self.run.adapter)
            return self.evaluate()

    def train_reward(self, *, force: bool = False) -> dict[str, Any]:
        """Only the reward adapter: trained on the pairs, measured on held-out ones, written to the run's reward folder."""
        self._for_reward_alone = True
        with self._running(resume=False, force=force):
            return self._train_reward()

    def evaluate(self) -> dict[str, Any]:
        """Before (adapters off) and after on held-out prompts; written to evaluation.json."""
        started = time.perf_counter()
        asked = f"{min(self.config.evaluation.num_prompts, len(self.data.held_out_prompts))} held-out prompts"
        self.view.phase("evaluation", asked)
        prompts, gold = self.data.held_out_prompts, known_gold(self._dataset)
        with watchdog.phase("evaluation", asked):
            result = evaluate_policy(self.model, self.engine, self.rewards, prompts, self.config, gold, judge=self.stepper.judge)
        if result:
            self._warn(*result.pop("warnings"))
            result["seconds"] = time.perf_counter() - started
            self.run.write_json("evaluation.json", result)
        self.run.event("phase", name="evaluation", seconds=time.perf_counter() - started)
        return result

    def save_model(self, folder: str | Path) -> Path:
        """Write the policy adapter as a PEFT folder, loadable with PeftModel.from_pretrained on the same base."""
        with saving(Path(folder)):
            self.model.save_adapter("policy", Path(folder))
        return Path(folder)

    def dry_run(self, *, force: bool = False) -> dict[str, Any]:
        """Everything up to the first rollout: memory, data, model. Writes nothing. Raises PreflightError as `train` does."""
        self._prepare(force=force)
        prompts, counts = self._prompts_of_step(0)[:2], dict(self.data.counts)
        return {"plan": self.plan(), "steps": self.total_steps, "counts": counts, "rewards": dict(self.weights), "prompts": prompts}

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

    def _loop(self) -> None:
        self.view.phase("training", f"{self.plan().product}; {len(self.data.prompts)} prompts, {self.total_steps} steps")
        counted = self.updater.counted
        if self._profiler:
            self._profiler.begin(self.step)
        hard_stop, signal = self.updater.hard_stop, self.updater.signal
        while self.step < self.total_steps and not hard_stop.reached and not signal.lost:
            record, scored = self._step_or_save()
            self.step += 1
            self.run.append_step(record, scored)
            self.view.step(record, self.total_steps, group=scored[0])
            last = self.run.last_metrics(CUT_OFF_STEPS + 1)  # of the log, which a resumed run has too
            self._warn(*step_warnings(record, self.config, counted), *never_stops(last, self.config), *self.stepper.reward_warnings)
            counted = self.updater.counted
            signal.update(record.metrics["frac_reward_zero_std"])
            if self.updater.over_budget():
                self._warn(f"the KL to the reference stayed above twice kl.ref_target: stopped at step {record.step}. Raise kl.beta.")
            due = self.config.save_steps and self.step % self.config.save_steps == 0
            if due or hard_stop.reached or signal.lost or self.step == self.total_steps:
                self.keeper.save(self.step)
            if self._profiler:
                self._profiler.step(record, [one.group for one in scored])
        if signal.lost or signal.never_there:  # must not pass for a success
            raise NoSignalError(no_signal(signal, self.config))

    def _step_or_save(self) -> tuple[StepRecord, list[ScoredGroup]]:
        """One step; what ends it early, a request or an error, must not cost the finished ones, nor what it had itself."""
        begun, self._begun = self._begun, None
        try:
            return self.stepper.train_step(self._prompts_of_step(self.step), self.step, begun)
        except BaseException as error:
            not_kept = self.keeper.save_after(error, self.step)
            if not_kept:
                self.view.warn(not_kept)
            raise

    def _warn(self, *texts: str) -> None:
        for text in texts:
            self.run.event("warn", text=text)
            self.view.warn(text)

    def _late(self, text: str, stack: Sequence[str]) -> None:
        """From the watchdog's thread."""
        if self._run is not None:
            self._run.event("late", text=text, stack=list(stack))
        self.view.warn(text)

    # ---- before and after the loop

    @contextmanager
    def _profiled(self, started: float | None) -> Iterator[None]:
        """Record what happens inside, and write and show the profile however it ends; None records nothing."""
        if started is None:
            yield
            return
        judges = {name: name == TRAINED for name in (TRAINED, ZERO_SHOT) if name in self.weights and not callable(self._function)}
        work = PhaseWork(self.model, find_shape(self.config.model_name), self.config, judges)
        self._profiler = Profiler(self.model, work, started)
        try:
            yield
        finally:
            profile, self._profiler = self._profiler.to_dict(), None
            self.run.write_json(PROFILE, profile)
            self.view.profile(profile)

    @contextmanager
    def _running(self, *, resume: bool, force: bool) -> Iterator[None]:
        """Everything a run needs, in the order in which it can fail cheaply; the outcome in run.json whatever happens."""
        watchdog_settings = self.config.watchdog.model_dump()
        with self.view, listening(self.config.max_minutes), watchdog.watching(self._late, **watchdog_settings):
            try:
                with interruptible(), watchdog.phase("loading", self.config.model_name):
                    if self._run is None:
                        self._open_run(resume=resume, force=force)
                    self._prepare(force=force)
                if resume:
                    resuming.check_data(self.run, self.data, self.config.dataset)
                resuming.check_base(self.run, self.config.model_name, self.model.checksums)
                self.run.event("start", resume=resume)
                yield
            except BaseException as error:
                if self._run is not None:
                    self.run.ended(self.step, error)
                raise
            else:
                self.run.ended(self.step)
            finally:
                if self._run is not None:
                    self.run.close()

    def _open_run(self, *, resume: bool, force: bool) -> None:
        config = self.config
        self._read_rows(force=force or resume)  # a run that goes on is planned with what it recorded
        if resume:
            self._run, notes = resuming.opened_run(config)
            self._run.update_run(status="running", ended=None, error=None, **self.code)
            self._warn(*notes)
            return
        RunDirectory.check(path := preflight.run_path(config))
        self._prepare(force=force)
        info = preflight.run_info(config, self.data, self.precision, self.plan()) | self.code
        adapter = sum(weight.numel() * weight.element_size() for weight in self.model.adapter_parameters("policy").values())
        needed = preflight.bytes_to_write(config, adapter, 0 if self._for_reward_alone else self.total_steps)
        self._run = RunDirectory.create(path, dump_recipe(config), info, needed_bytes=needed)

    def _prepare(self, *, force: bool) -> None:
        """Plan the memory, load the model, tokenise the data, lay out the steps; once."""
        if self._prepared:
            return
        config = self.config
        rows = self._read_rows(force=force)
        if self._must_train_reward:
            preflight.check_reward_can_be_had(rows, config)
        plan = self.plan()
        preflight.refuse_unless_it_fits(plan, force=force)
        self.view.note(plan.summary)
        preflight.hold_to_limit(config)
        self.view.phase("loading", config.model_name)
        self.model = Gemma.load(
            config.model_name, lora=config.lora, precision=config.precision, quantization=config.quantization, seed=config.seed
        )
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.model.budget = TokenBudget(plan.token_budget)
        self.engine = LocalEngine(self.model, plan.kv_token_budget)
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

    def _prompts_of_step(self, step: int) -> Sequence[Prompt]:
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.config.prompts_per_step
        return order(self.data.prompts, self.config.seed, epoch)[start : start + self.config.prompts_per_step]

    def _train_reward(self) -> dict[str, Any]:
        if self.config.reward_model.path is not None:
            self._load_reward()
            return self._calibration
        self.view.phase("reward adapter", f"no reward given: training one on {len(self.data.pairs)} preference pairs")
        started = time.perf_counter()
        data, gold, keeper = self.data, gold_margin(self._dataset), RewardKeeper(self.run, self.config, self._warn)
        pairs, prompts = (data.pairs, data.held_out_pairs), data.held_out_prompts or data.prompts
        run = partial(keeper.train, progress=self._reward_progress)
        with watchdog.phase("reward training", f"{len(data.pairs)} pairs"):
            self._calibration = train_and_measure_reward(self.model, self.engine, pairs, prompts, self.config, gold=gold, run=run)
        release(self.model.device)
        with saving(self.run.reward):
            self.model.save_adapter("reward", self.run.reward)
        self.run.write_json(f"reward/{CALIBRATION}", self._calibration)
        keeper.done()
        self.run.event("phase", name="reward adapter", seconds=time.perf_counter() - started)
        return self._calibration

    def _reward_progress(self, update: int, total: int, loss: float, accuracy: float) -> None:
        self.run.event("reward_training", update=update, loss=loss, accuracy=accuracy)
        self.view.reward_training(update, total, loss, accuracy)

    def _load_reward(self) -> None:
        if TRAINED not in self.weights:
            return
        given = self.config.reward_model.path
        folder = self.run.reward if given is None else Path(given)
        self.model.load_adapter("reward", folder)
        path = folder / CALIBRATION
        if not path.is_file():
            raise ValueError(f"{folder} has no calibration.json, which says how its rewards are scaled. Give a folder train-reward wrote.")
        self._calibration = json.loads(path.read_text(encoding="utf-8"))

    def _build_rewards(self) -> None:
        mean = self._calibration.get("reference_mean") or 0.0
        judge = zero_shot_judge(self._function, self.weights, self.model)
        self.rewards = build_reward_stack(self._function, self.weights, self.model, self.config, mean, judge=judge)
        clock = self._profiler.clock if self._profiler else time.perf_counter
        self.stepper = Stepper(self.model, self.engine, self.rewards, self.updater, self.config, judge=judge, clock=clock)
        self.keeper = Keeper(self.run, self.config, self.stepper)

    def _go_on_from(self, checkpoint: Checkpoint | None) -> None:
        self._warn(*resuming.differences(self.run))
        if checkpoint is None:
            self.run.truncate({})
            self.view.note("no step was saved before the run ended: it begins again")
            return
        self._begun = self.keeper.restore(checkpoint, self._prompts_of_step(checkpoint.step))
        self.step = checkpoint.step
        restored = f"adapter, optimizer, controllers and data position{', and what the next step had' if self._begun else ''}"
        self.view.note(f"resumed {checkpoint.path.name}: {restored}; {self.step}/{self.total_steps} steps")
