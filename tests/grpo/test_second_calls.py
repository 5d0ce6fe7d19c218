"""One trainer object, called again: it goes on from what is on the disk, or says that it cannot; and errors where nobody expects them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import StopAt, assert_same_run

from gemma_grpo.checkpoint import CheckpointError, read_checkpoint
from gemma_grpo.grpo.resuming import ResumeError
from gemma_grpo.monitor.events import RunDirectory, RunDirectoryError
from gemma_grpo.monitor.terminal import ProgressView
from gemma_grpo.stopping import Stopped

PASSES: dict[str, Any] = {"planning_steps": 3, "save_steps": 1, "kl.step_limit": None, "optimizer.schedule": "constant"}


def some_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(ids) / len(ids) / 100 for ids in completion_ids]


class FailingView(ProgressView):
    """Somebody's own view, with a mistake at one step."""

    def step(self, record: Any, total_steps: int, group: Any = None) -> None:
        if record.step == 3:
            raise KeyError("reward/accuracy")


def steps_logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


class Same:
    """A run as assert_same_run wants it, of a folder."""

    def __init__(self, like: Any, folder: Path, evaluation: Any) -> None:
        self.path, self.evaluation, self._like = folder, evaluation, like

    def text(self, name: str) -> str:
        return (self.path / name).read_text(encoding="utf-8")

    def adapter(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return dict(load_file(self.path / "adapter" / "adapter_model.safetensors"))


# ---- the same object again


def test_an_error_of_the_view_costs_no_step_and_the_same_object_goes_on_from_the_disk(
    train_tiny: Callable[..., Any], tiny_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {"reward": some_reward, "max_steps": 4, "save_steps": 0}
    whole = train_tiny(**settings)
    trainer = tiny_trainer(output_dir=str(tmp_path / "run"), view=FailingView(), **settings)
    with pytest.raises(KeyError, match="reward/accuracy"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    trainer.view = ProgressView()
    evaluation = trainer.train(resume_from_checkpoint=True)
    assert steps_logged(tmp_path / "run") == [1, 2, 3, 4]
    assert_same_run(Same(whole, tmp_path / "run", evaluation), whole)
    info = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert (info["status"], info["error"]) == ("finished", None)


def test_training_again_without_going_on_is_refused_and_the_run_left_alone(tiny_trainer: Callable[..., Any], tmp_path: Path) -> None:
    trainer = tiny_trainer(reward=some_reward, output_dir=str(tmp_path / "run"))
    trainer.train()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"this trainer's run .* has begun\. train\(resume_from_checkpoint=True\) goes on with it"):
        trainer.train()
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_that_refused_other_data_is_not_trained_into_by_a_second_call(
    train_tiny: Callable[..., Any], tiny_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    run = train_tiny(reward=some_reward, max_steps=2, save_steps=1)
    rows = list(run.trainer._dataset)[:-1]
    trainer = tiny_trainer(reward=some_reward, dataset=rows, max_steps=3, output_dir=str(run.path))
    with pytest.raises(ResumeError, match="dataset fingerprint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="has begun"):
        trainer.train()
    assert steps_logged(run.path) == [1, 2]


def test_while_it_goes_on_the_run_is_locked_again(tiny_trainer: Callable[..., Any], tmp_path: Path) -> None:
    folder, seen, calls = tmp_path / "run", [], 0

    def looking(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("the scorer went away")
        if calls > 2:
            with pytest.raises(RunDirectoryError, match="is being written by process"):
                RunDirectory.open(folder)
            seen.append(json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"])
        return some_reward(completion_ids)

    trainer = tiny_trainer(reward=looking, output_dir=str(folder), max_steps=3)
    with pytest.raises(ValueError, match="the scorer went away"):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert seen == ["running", "running"]


def test_training_only_the_reward_may_be_followed_by_training_the_policy(tiny_trainer: Callable[..., Any], tmp_path: Path) -> None:
    trainer = tiny_trainer(reward={"generative": 1.0}, output_dir=str(tmp_path / "run"), **{"reward_model.max_pairs": 8})
    calibration = trainer.train_reward()
    trainer.train()
    assert steps_logged(tmp_path / "run") == [1, 2]
    assert json.loads((tmp_path / "run" / "reward" / "calibration.json").read_text(encoding="utf-8")) == json.loads(json.dumps(calibration))


def test_training_only_the_reward_goes_on_too_and_has_nothing_to_do_once_it_is_over(
    tiny_trainer: Callable[..., Any], stop_at: StopAt, tmp_path: Path
) -> None:
    settings = {"reward": {"generative": 1.0}, "reward_model.max_pairs": 16, "reward_model.batch_size": 4, "save_steps": 1}
    expected = tiny_trainer(output_dir=str(tmp_path / "whole"), **settings).train_reward()
    doing = stop_at(10**9)
    tiny_trainer(output_dir=str(tmp_path / "watched"), max_minutes=1, **settings).train_reward()
    training = [index for index, now in enumerate(doing) if now == "reward training"]
    stop_at(training[len(training) // 2])
    with pytest.raises(Stopped):
        tiny_trainer(output_dir=str(tmp_path / "run"), max_minutes=1, **settings).train_reward()
    stop_at(10**9)
    again = tiny_trainer(output_dir=str(tmp_path / "run"), **settings)
    assert again.train_reward(resume_from_checkpoint=True) == expected
    files = [(folder / "reward" / "adapter_model.safetensors").read_bytes() for folder in (tmp_path / "run", tmp_path / "whole")]
    assert files[0] == files[1]
    third = tiny_trainer(output_dir=str(tmp_path / "run"), **settings)
    assert third.train_reward(resume_from_checkpoint=True) == json.loads(json.dumps(expected))


def test_evaluating_again_needs_the_run_that_another_may_hold_by_then(tiny_trainer: Callable[..., Any], tmp_path: Path) -> None:
    trainer = tiny_trainer(reward=some_reward, output_dir=str(tmp_path / "run"), **{"evaluation.num_prompts": 2})
    first = trainer.train()
    with RunDirectory.open(tmp_path / "run"), pytest.raises(RunDirectoryError, match="is being written by process"):
        trainer.evaluate()
    assert {**trainer.evaluate(), "seconds": 0} == {**first, "seconds": 0}
    RunDirectory.open(tmp_path / "run").close()  # and it is let go again


def test_a_budget_that_training_the_reward_learned_is_known_when_the_run_goes_on(
    train_tiny: Callable[..., Any], tiny_trainer: Callable[..., Any], stop_at: StopAt, tmp_path: Path
) -> None:
    settings = {"reward": {"generative": 1.0}, "max_steps": 2, "save_steps": 0, "reward_model.max_pairs": 8}

    def trainer_that_runs_out_once(**more: Any) -> Any:
        trainer = tiny_trainer(**settings, **more)
        trainer.dry_run()
        work, calls = trainer.model.hidden_states, 0

        def hidden_states(layout: Any) -> Any:
            nonlocal calls
            calls += torch.is_grad_enabled()
            if calls == 1:
                calls += 1
                raise torch.OutOfMemoryError("none left")
            return work(layout)

        trainer.model.hidden_states = hidden_states
        return trainer

    whole = trainer_that_runs_out_once(output_dir=str(tmp_path / "whole"))
    whole.train()
    doing = stop_at(10**9)
    trainer_that_runs_out_once(output_dir=str(tmp_path / "watched"), max_minutes=1).train()
    stop_at(doing.index("rollout"))
    with pytest.raises(Stopped):
        trainer_that_runs_out_once(output_dir=str(tmp_path / "run"), max_minutes=1).train()
    stop_at(10**9)
    run = train_tiny(resume=True, output_dir=str(tmp_path / "run"), **settings)
    assert run.metrics("oom_retries") == [1.0, 1.0]
    assert run.text("metrics.jsonl") == (tmp_path / "whole" / "metrics.jsonl").read_text(encoding="utf-8")


# ---- a step that is neither whole nor not begun


def stopped_in_the_last_pass(tiny_trainer: Callable[..., Any], stop_at: StopAt, folder: Path, **settings: Any) -> None:
    doing = stop_at(10**9)
    tiny_trainer(max_minutes=1, **settings).train()
    at = [index for index, now in enumerate(doing) if now == "update"][-1]
    stop_at(at)
    with pytest.raises(Stopped):
        tiny_trainer(max_minutes=1, output_dir=str(folder), **settings).train()
    stop_at(10**9)


def test_a_run_made_shorter_cannot_end_inside_a_step(tiny_trainer: Callable[..., Any], stop_at: StopAt, tmp_path: Path) -> None:
    settings = {"reward": some_reward, **PASSES}
    stopped_in_the_last_pass(tiny_trainer, stop_at, tmp_path / "run", max_steps=2, **settings)
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000001").state["under_way"]["count"] == 2
    message = r"step-00000001 is in the middle of step 2: .* These settings end at step 1; give max_steps=2 or more\."
    with pytest.raises(ResumeError, match=message):
        tiny_trainer(max_steps=1, output_dir=str(tmp_path / "run"), **settings).train(resume_from_checkpoint=True)


def test_an_update_that_cannot_even_begin_again_keeps_its_passes(
    train_tiny: Callable[..., Any], tiny_trainer: Callable[..., Any], stop_at: StopAt, tmp_path: Path
) -> None:
    settings = {"reward": some_reward, "max_steps": 2, **PASSES}
    whole = train_tiny(**settings)
    stopped_in_the_last_pass(tiny_trainer, stop_at, tmp_path / "run", **settings)
    trainer = tiny_trainer(output_dir=str(tmp_path / "run"), **settings)
    trainer.dry_run()

    def none_left() -> Any:
        raise torch.OutOfMemoryError("none left")

    trainer.updater.optimizer.snapshot = none_left
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train(resume_from_checkpoint=True)
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000001").state["under_way"]["count"] == 2
    assert_same_run(train_tiny(resume=True, output_dir=str(tmp_path / "run"), **settings), whole)


def test_an_error_after_the_update_and_before_the_step_is_whole_saves_nothing_and_says_so(
    train_tiny: Callable[..., Any], tiny_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {"reward": some_reward, "max_steps": 3, "save_steps": 1}
    whole, readings = train_tiny(**settings), 0

    def breaking_clock() -> float:
        nonlocal readings
        readings += 1
        if readings == 16:  # of four phases a step, two a phase: the end of the second step's update
            raise RuntimeError("the device is gone")
        return time.perf_counter()

    class Told(ProgressView):
        def warn(self, text: str) -> None:
            told.append(text)

    told: list[str] = []
    trainer = tiny_trainer(output_dir=str(tmp_path / "run"), view=Told(), **settings)
    build = trainer._build_rewards

    def with_clock() -> None:
        build()
        trainer.stepper.clock = breaking_clock

    trainer._build_rewards = with_clock
    with pytest.raises(RuntimeError, match="the device is gone"):
        trainer.train()
    assert told[-1:] == ["nothing was saved, as the weights are in the middle of step 2: the last checkpoint is step 1's"]
    assert_same_run(train_tiny(resume=True, output_dir=str(tmp_path / "run"), **settings), whole)


# ---- the trained judge


@pytest.mark.parametrize("what", ["one bit of the adapter", "the calibration"])
def test_a_trained_judge_that_changed_is_refused(
    train_tiny: Callable[..., Any], tiny_trainer: Callable[..., Any], tmp_path: Path, what: str
) -> None:
    settings = {"reward": {"generative": 1.0}, "max_steps": 2, "save_steps": 1, "reward_model.max_pairs": 8}
    folder = tmp_path / "run"
    shutil.copytree(train_tiny(**settings).path, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000002")
    shutil.rmtree(folder / "adapter")
    if what == "the calibration":
        path = folder / "reward" / "calibration.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "reference_mean": 0.123}))
    else:
        path = folder / "reward" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-2] + bytes([path.read_bytes()[-2] ^ 1]) + path.read_bytes()[-1:])
    with pytest.raises(CheckpointError, match=r"step-00000001 is of another run: its reward adapter"):
        tiny_trainer(output_dir=str(folder), **settings).train(resume_from_checkpoint=True)


# ---- why a run ended


def test_a_stop_that_a_reward_makes_an_error_of_is_a_stop(tiny_trainer: Callable[..., Any], tmp_path: Path) -> None:
    def stubborn(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except BaseException as error:
            raise RuntimeError("connection lost") from error
        return some_reward(completion_ids)

    with pytest.raises(Stopped, match="by SIGTERM"):
        tiny_trainer(reward=stubborn, output_dir=str(tmp_path / "run")).train()
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["status"] == "stopped"


def test_a_stop_while_the_trained_reward_is_measured_keeps_its_updates(
    train_tiny: Callable[..., Any], tiny_trainer: Callable[..., Any], stop_at: StopAt, tmp_path: Path
) -> None:
    settings = {"reward": {"generative": 1.0}, "max_steps": 1, "save_steps": 0, "reward_model.max_pairs": 8, "reward_model.batch_size": 4}
    whole = train_tiny(**settings)
    doing = stop_at(10**9)
    train_tiny(max_minutes=1, **settings)
    saving = next(index for index, now in enumerate(doing) if now == "rollout")  # the first step; measuring ends before it
    stop_at(saving - 1)
    with pytest.raises(Stopped):
        tiny_trainer(max_minutes=1, output_dir=str(tmp_path / "run"), **settings).train()
    stop_at(10**9)
    assert [path.name for path in (tmp_path / "run" / "reward" / "checkpoints").iterdir()] == ["step-00000002"]
    run = train_tiny(resume=True, output_dir=str(tmp_path / "run"), **settings)
    assert_same_run(run, whole)
    assert [line["update"] for line in run.lines("events.jsonl") if line["kind"] == "reward_training"] == [1, 2]


def test_a_finished_run_without_an_evaluation_has_nothing_to_do_either(
    train_tiny: Callable[..., Any], tiny_trainer: Callable[..., Any]
) -> None:
    run = train_tiny(reward=some_reward)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    assert tiny_trainer(reward=some_reward, output_dir=str(run.path)).train(resume_from_checkpoint=True) == {}
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()} == before
