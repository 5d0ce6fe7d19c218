"""GRPOTrainer: the loop. Rollouts, rewards, advantages, update; before it the reward adapter, after it the evaluation.

Owns the order of things and what goes into the run directory. How each part is done is the part's own file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_grpo import distributed, watchdog
from gemma_grpo.checkpoint import Checkpoint, saving
from gemma_grpo.config import build_config, load_recipe
from gemma_grpo.evaluation import frontier_report
from gemma_grpo.grpo import resuming
from gemma_grpo.grpo.abilities import Task, check_tasks, evaluate_tasks
from gemma_grpo.grpo.assess import Scorers, evaluate_policy, evaluate_refusals, judge_warnings, measured_before
from gemma_grpo.grpo.baselines import Baselines
from gemma_grpo.grpo.canned import canned_report, check_canned
from gemma_grpo.grpo.explain import CUT_OFF_STEPS, NoSignalError, never_stops, no_signal, step_warnings
from gemma_grpo.grpo.gates import REMEDY, failing, gate_report, gate_warning
from gemma_grpo.grpo.judges import CALIBRATION
from gemma_grpo.grpo.keeping import Keeper
from gemma_grpo.grpo.lookout import BEST, Lookout
from gemma_grpo.grpo.preparation import Preparation
from gemma_grpo.grpo.setup import (
    GIVEN_ROWS,
    PAIRWISE,
    TRAINED,
    ZERO_SHOT,
    build_reward_stack,
    given_functions,
    gold_margin,
    known_gold,
    lexical_witness,
    pairwise_judge,
    zero_shot_judge,
)
from gemma_grpo.grpo.step import Stepper
from gemma_grpo.monitor.card import write_card
from gemma_grpo.monitor.events import RunDirectory, RunDirectoryError
from gemma_grpo.monitor.terminal import Schedule
from gemma_grpo.planner import find_shape
from gemma_grpo.profile.recorder import PROFILE, PhaseWork, Profiler
from gemma_grpo.reward.zero_shot import ZeroShotJudge
from gemma_grpo.types import ScoredGroup, StepRecord
from gemma_grpo.upload import check_write_access, upload


class GRPOTrainer(Preparation):
    """Fine-tunes a Gemma 3 on preferences: `GRPOTrainer(model_name=..., dataset=...).train()`.

    Every setting of GRPOConfig is a keyword, nested ones as a mapping or dotted ("kl.beta"). `dataset` may also be rows or a
    datasets.Dataset; `reward` also a function f(prompts, completions, **columns) -> list of float or None, or weights of names that
    `reward_functions` maps to such functions. Wrong settings raise ConfigError at once, all of them together.
    """

    def __init__(
        self,
        model_name: str | None = None,
        dataset: Any = None,
        reward: Any = None,
        *,
        reward_functions: Any = None,
        view: Any = None,
        **settings: Any,
    ) -> None:
        named: dict[str, Any] = {"model_name": model_name, "dataset": dataset if isinstance(dataset, str | None) else GIVEN_ROWS}
        named["reward"] = reward if isinstance(reward, Mapping) else {reward: 1.0} if isinstance(reward, str) else None
        settings |= {name: value for name, value in named.items() if value is not None}
        self._set_up(build_config(settings), dataset, given_functions(reward, reward_functions), view)

    @classmethod
    def from_recipe(
        cls,
        path: str | Path,
        overrides: Mapping[str, Any] | None = None,
        *,
        reward_functions: Any = None,
        view: Any = None,
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

    # ---- what a user calls

    def train(
        self, resume_from_checkpoint: bool | None = None, *, force: bool = False, profile: bool = False, push_to_hub: str | None = None
    ) -> dict[str, Any]:
        """The whole road: reward adapter (when the reward is the trained judge), GRPO, evaluation. Returns the evaluation.

        With resume_from_checkpoint the run in output_dir goes on after its newest checkpoint; one that is finished is left as it is.
        Raises PreflightError, before anything is loaded, when the plan does not fit; `force` runs all the same. `profile` measures
        this machine and writes profile.json: where the time went, beside what the machine could do. `push_to_hub` names a repository,
        USER/NAME: whether it may be written to is asked first (AccessError), the adapter and its card are uploaded last.
        """
        if push_to_hub is not None:
            check_write_access(push_to_hub)
        with self._taking_part():
            # rank 0 sees the run directory, others may not
            evaluation = self._train(bool(distributed.from_main(bool(resume_from_checkpoint), "the start")), force, profile)
        if push_to_hub is not None and distributed.is_main():
            self.view.note(f"uploaded: {upload(push_to_hub, self.run.adapter)}")
        return evaluation

    def _train(self, resume_from_checkpoint: bool, force: bool, profile: bool) -> dict[str, Any]:
        started = time.perf_counter()
        if self._run is not None and resume_from_checkpoint:
            self._forget()
        done = resuming.finished_run(self.config) if resume_from_checkpoint and distributed.is_main() else None
        if distributed.from_main(done is not None, "looking for the run"):
            if done is None:
                return {}
            self._run, steps, evaluation = done
            self.view.note(f"nothing to do: {self.run.path} finished at step {steps}")
            return evaluation
        with self._running(resume=resume_from_checkpoint, force=force), self._profiled(started if profile else None):
            checkpoint = resuming.newest_checkpoint(self.run, self._warn) if resume_from_checkpoint else None
            if resume_from_checkpoint and (self.run.reward / CALIBRATION).is_file():
                self._load_reward()
            elif TRAINED in self.weights and not self.judges.known:
                self._train_reward()
            self._build_rewards()
            prompts = self.data.held_out_prompts or self.data.prompts
            self._warn(*judge_warnings(self.run, self.judges.calibration, self.stepper.judge, prompts))
            if resume_from_checkpoint:
                self._go_on_from(checkpoint)
            self._loop()
            self.save_model(self.run.adapter)
            return self.evaluate()

    def train_reward(self, resume_from_checkpoint: bool | None = None, *, force: bool = False) -> dict[str, Any]:
        """Only the reward adapter: trained on the pairs, measured on held-out ones, written to the run's reward folder.

        With resume_from_checkpoint the training in output_dir goes on after its last saved update; one that is over is left as it is.
        """
        self._for_reward_alone = True
        with self._taking_part():
            return self._train_reward_alone(bool(distributed.from_main(bool(resume_from_checkpoint), "the start")), force)

    def _train_reward_alone(self, resume: bool, force: bool) -> dict[str, Any]:
        with self._running(resume=resume, force=force):
            path = self.run.reward / CALIBRATION
            if path.is_file():
                self._load_reward()  # so that train() on this object does not train it again
            calibration = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else self._train_reward()
        self._may_go_on = True
        return calibration

    def evaluate(self, *, baselines: bool = False, tasks: Sequence[Task] = (), task_limit: int | None = None) -> dict[str, Any]:
        """Before (adapters off) and after on held-out prompts; written to evaluation.json, with `baselines` also what best-of-n, DPO
        and SFT make of the same preferences, with `tasks` also what the lm-evaluation-harness makes of both sides, on the first
        `task_limit` questions of each. Raises RunDirectoryError where another process holds the run.
        """
        if not self.run.is_held:
            with RunDirectory.open(self.run.path) as self._run, self._serving():
                return self.evaluate(baselines=baselines, tasks=tasks, task_limit=task_limit)
        check_tasks([task for task in tasks if isinstance(task, str)])
        started = time.perf_counter()
        asked = f"{min(self.config.evaluation.num_prompts, len(self.data.held_out_prompts))} held-out prompts"
        self.view.phase("evaluation", asked)
        prompts, scorers = self.data.held_out_prompts, self.lookout.scorers
        with watchdog.phase("evaluation", asked):
            result = evaluate_policy(self.model, self.engine, scorers, prompts, self.config, judge=self.stepper.judge)
        if result:
            self._warn(*result.pop("warnings"))
            result = evaluate_refusals(self.engine, self.data.look_alikes, self.config) | result  # the data's own come first
            result |= {"frontier": frontier_report(self.run.looks()), "primary": self.config.evaluation.primary}
            result["seconds"] = time.perf_counter() - started
            result |= measured_before(self.run, result)
            self.run.write_json("evaluation.json", result)  # what comes below takes longer, and may fail
            if baselines:
                given = (self.run, self.model, self.engine, scorers, self.data, self.config)
                result["baselines"] = Baselines(*given).measure(lambda text: self.view.phase("baseline", text))
                self.run.write_json("evaluation.json", result)
        if tasks:
            self.view.phase("tasks", f"{len(tasks)}, before and after")
            size = self.config.num_generations  # as many texts as are sampled of one prompt
            result["tasks"] = evaluate_tasks(self.model, tasks, limit=task_limit, batch_size=size, seed=self.config.seed)
            self._warn(*(f"task {name}: no metric of it is a mean over questions" for name, found in result["tasks"].items() if not found))
            self.run.write_json("evaluation.json", result)
        write_card(self.run.path)
        self.run.event("phase", name="evaluation", seconds=time.perf_counter() - started)
        self.view.took("evaluation", time.perf_counter() - started, self.step)
        return result

    def save_model(self, folder: str | Path) -> Path:
        """Write the policy adapter as a PEFT folder, loadable with PeftModel.from_pretrained on the same base."""
        with saving(path := Path(folder)):
            self.model.save_adapter("policy", path)
        return path

    def push_to_hub(self, repository: str, *, public: bool = False) -> str:
        """Upload the run's adapter and its card to USER/NAME, private unless `public`. Returns the address; raises AccessError."""
        check_write_access(repository)
        return upload(repository, self.run.adapter, public=public)

    def dry_run(self, *, force: bool = False) -> dict[str, Any]:
        """Everything up to the first rollout: memory, data, model, and the rewards on replies that stand beside the prompts, if any do.

        Writes nothing. Raises PreflightError as `train` does, and where a bad reply is worth as much as a good one.
        """
        self._prepare(force=force)
        prompts, counts = self._prompts_of_step(0)[:2], dict(self.data.counts)
        canned = canned_report(self._function, self.weights, self.model, self.engine, self.data, self.config)
        found = {"plan": self.plan(), "steps": self.total_steps, "counts": counts, "rewards": dict(self.weights), "prompts": prompts}
        return {**found, "canned": check_canned(canned)}

    def _loop(self) -> None:
        self.view.phase("training", f"{self.plan().product}; {len(self.data.prompts)} prompts, {self.total_steps} steps")
        self.run.update_run(total_steps=self.total_steps)
        self.view.schedule(self._schedule())
        self.view.earlier(self.run.last_metrics(self.step), self.run.looks())
        counted = self.updater.counted
        if self._profiler:
            self._profiler.begin(self.step)
        self._waited = distributed.seconds_waited()
        hard_stop, signal = self.updater.hard_stop, self.updater.signal
        if self._look() and self.step:
            self._save()  # the look that a stop broke off: the checkpoint it went on from does not know of it
        self._alerted = self.lookout.alerted
        if hard_stop.reached and self.step < self.total_steps:
            self._warn(f"kl.hard_stop_steps ended this run at step {self.step}: it makes no further one")
        while self.step < self.total_steps and not (hard_stop.reached or signal.lost or self._alerted):
            record, scored = self._step_or_save()
            self.step += 1
            signal.update(record.metrics["frac_reward_zero_std"])
            stopped = self.updater.over_budget()
            self.run.append_step(record, scored)  # from here on the step is whole, and can be saved
            with self._saved_if_it_fails():
                self._log_idle_ranks(record)
                self.view.step(record, self.total_steps, group=scored[0])
                last = self.run.last_metrics(CUT_OFF_STEPS + 1)  # of the log, which a resumed run has too
                self._warn(*step_warnings(record, self.config, counted), *never_stops(last, self.config), *self.stepper.reward_warnings)
                self._look()
                if stopped:
                    self._warn(f"the KL to the reference stayed above twice kl.ref_target: stopped at step {record.step}. Raise kl.beta.")
            counted = self.updater.counted
            due = self.config.save_steps and self.step % self.config.save_steps == 0
            if due or hard_stop.reached or signal.lost or self._alerted or self.step == self.total_steps:
                self._save()
            if self._profiler:
                self._profiler.step(record, [one.group for one in scored])
        if signal.lost or signal.never_there:  # must not pass for a success
            raise NoSignalError(no_signal(signal, self.config))

    def _log_idle_ranks(self, record: StepRecord) -> None:
        """What share of a step each rank waited for others."""
        waited, self._waited = distributed.seconds_waited() - self._waited, distributed.seconds_waited()
        if distributed.world() > 1:
            shares = distributed.gather(waited / max(1e-9, sum(record.seconds.values())), "logging")
            self.run.event("ranks", step=record.step, idle=[round(share, 4) for share in shares])

    def _look(self) -> bool:
        """Look at the policy if it is time, and say what is alarming; whether it was time."""
        if not self.lookout.due(self.step, self.total_steps):
            return False
        started = time.perf_counter()
        with watchdog.phase("witness", f"step {self.step}"):
            self.lookout.look(self.step)
        self.view.took("look", time.perf_counter() - started, self.step)
        self.view.look(self.run.looks())
        self._alerted = self.lookout.alerted
        if self._alerted:
            self._warn(f"witness.stop_on_alert ended this run at step {self.step}; the adapter the witness liked best is in {BEST}/")
        return True

    def _save(self) -> None:
        started = time.perf_counter()
        self.keeper.save(self.step)
        self.view.took("checkpoint", time.perf_counter() - started, self.step)

    def _schedule(self) -> Schedule:
        """What the view counts as still to come. The evaluation answers as a look does, each prompt before and after."""
        evaluation, look = self.config.evaluation, self.lookout.num_replies
        prompts = min(evaluation.num_prompts, len(self.data.held_out_prompts))
        replies = 2 * evaluation.num_completions * (prompts + len(self.data.look_alikes) if prompts else 0)
        return Schedule(self.config.witness.every if look else 0, self.config.save_steps, replies / look if look else float(replies))

    def _step_or_save(self) -> tuple[StepRecord, list[ScoredGroup]]:
        """One step; what ends it early, a request or an error, must not cost the finished ones, nor what it had itself."""
        begun, self._begun = self._begun, None
        with self._saved_if_it_fails():
            return self.stepper.train_step(self._prompts_of_step(self.step), self.step, begun)
        raise AssertionError("not reached")

    @contextmanager
    def _saved_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if not_kept := self.keeper.save_after(error, self.step):
                self.view.warn(not_kept)
            raise

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
            try:
                self.run.write_json(PROFILE, profile)
            except RunDirectoryError as error:  # must not take the place of why the run ended
                self.view.warn(str(error))
            self.view.profile(profile)

    def _train_reward(self) -> dict[str, Any]:
        if self.config.reward_model.path is not None:
            self._load_reward()
            return self.judges.calibration
        witness = f", and a witness on {len(self.data.witness_pairs)} others" if self.data.witness_pairs else ""
        self.view.phase("reward adapter", f"no reward given: training one on {len(self.data.pairs)} preference pairs{witness}")
        started = time.perf_counter()
        self.judges.train(self.run, self.engine, self.data, gold_margin(self._dataset), progress=self._reward_progress, warn=self._warn)
        self.run.event("phase", name="reward adapter", seconds=time.perf_counter() - started)
        return self.judges.calibration

    def _reward_progress(self, adapter: str, update: int, total: int, loss: float, accuracy: float) -> None:
        self.run.event("reward_training", adapter=adapter, update=update, loss=loss, accuracy=accuracy)
        self.view.reward_training(update, total, loss, accuracy, adapter=adapter)

    def _load_reward(self) -> None:
        if TRAINED in self.weights:
            self.judges.load(self.run)

    def _build_rewards(self) -> None:
        mean = self.judges.calibration.get("reference_mean") or 0.0
        judge = zero_shot_judge(self._function, self.weights, self.model, self.config.judge.rubric)
        trained, weights = self.judges.reward() if self.judges.known else None, self._gated(judge)
        self.rewards = build_reward_stack(
            self._function, weights, self.model, self.config, mean, trained=trained, judge=judge, engine=self.engine
        )
        clock = self._profiler.clock if self._profiler else time.perf_counter
        self.stepper = Stepper(self.model, self.engine, self.rewards, self.updater, self.config, judge=judge, clock=clock)
        self.keeper = Keeper(self.run, self.config, self.stepper, self.judges.files() if self.judges.known else ())
        scorers = Scorers(self.rewards, self.judges.witness(), known_gold(self._dataset), lexical_witness(self.data))
        self.lookout = Lookout(self.run, self.model, self.engine, scorers, self.data, self.config)

    def _gated(self, judge: ZeroShotJudge | None) -> dict[str, float]:
        """The weights, 0 for judges of the untouched model that fail on the held-out pairs. Raises ValueError where none is left."""
        least, weights = self.config.judge.least_accuracy, dict(self.weights)
        pairwise = pairwise_judge(self.model, self.config) if PAIRWISE in weights and not callable(self._function) else None
        judges = {name: one for name, one in ((ZERO_SHOT, judge), (PAIRWISE, pairwise)) if one is not None}
        if not judges or not least or not self.data.held_out_pairs:
            return weights
        known = self.run.read_run().get("gates", {})
        reports = {name: known.get(name) or gate_report(one, self.data.held_out_pairs) for name, one in judges.items()}
        self.run.update_run(gates=reports)
        for name, report in reports.items():
            if failing(report, least):
                weights[name] = 0.0
                self._warn(gate_warning(name, report, least))
        if not any(weights.values()):
            raise ValueError(f"no reward is left to train with: {', '.join(reports)} cannot be trusted on these data. {REMEDY}")
        return weights

    def _go_on_from(self, checkpoint: Checkpoint | None) -> None:
        self._warn(*resuming.differences(self.run))
        if checkpoint is None:
            self.run.truncate({})
            self.view.note("no step was saved before the run ended: it begins again")
            return
        self._begun = self.keeper.restore(checkpoint, self._prompts_of_step(checkpoint.step))
        self.step = checkpoint.step
        if self.step >= self.total_steps and self._begun is not None and self._begun.passes is not None and self._begun.passes.count > 1:
            raise resuming.ResumeError(
                f"{checkpoint.path} is in the middle of step {self.step + 1}: its weights have some of that step's passes. "
                f"These settings end at step {self.total_steps}; give max_steps={self.step + 1} or more."
            )
        restored = f"adapter, optimizer, controllers and data position{', and what the next step had' if self._begun else ''}"
        self.view.note(f"resumed {checkpoint.path.name}: {restored}; {self.step}/{self.total_steps} steps")
