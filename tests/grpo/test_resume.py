"""The same settings give the same run to the byte: repeated, interrupted and continued, after any step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_grpo.checkpoint import CheckpointError
from gemma_grpo.reward.base import RewardError

DEMANDING: dict[str, Any] = {
    "max_steps": 4,
    "save_steps": 1,
    "planning_steps": 2,
    "lora.dropout": 0.1,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_updates": 2,
    "kl.ref_target": 0.001,
    "entropy.threshold": 2.0,
    "evaluation.num_prompts": 3,
}
"""Everything that has a memory: Adam, the KL and the entropy controller, the schedule, dropout, the order of the prompts."""
LOGS = ("metrics.jsonl", "samples.jsonl")


def some_reward(completion_ids, **columns):
    return [sum(ids) / len(ids) / 100 for ids in completion_ids]


def failing_at(step: int) -> Callable[..., list[float]]:
    """The same reward, until it is called for the step with this number, from 1."""
    calls = 0

    def some_reward(completion_ids, **columns):
        nonlocal calls
        calls += 1
        if calls == step:
            raise RuntimeError("the scorer went away")
        return [sum(ids) / len(ids) / 100 for ids in completion_ids]

    return some_reward


def assert_same_run(run: Any, expected: Any) -> None:
    for name in LOGS:
        assert run.text(name) == expected.text(name), name
    adapter, other = run.adapter(), expected.adapter()
    assert adapter.keys() == other.keys()
    assert all(torch.equal(adapter[name], value) for name, value in other.items())
    assert {**run.evaluation, "seconds": 0} == {**expected.evaluation, "seconds": 0}


@pytest.fixture(scope="module")
def uninterrupted(train_tiny):
    return train_tiny(reward=some_reward, **DEMANDING)


@pytest.fixture(scope="module")
def with_trained_reward(train_tiny):
    return train_tiny(reward={"generative": 1.0, "length": 0.1}, **DEMANDING)


def cut_back(run: Any, step: int, folder: Path) -> Path:
    """A copy of a run as it would be, had it been killed some time after a checkpoint; its logs may have gone on."""
    shutil.copytree(run.path, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(folder / "adapter")
    (folder / "evaluation.json").unlink()
    return folder


# ---- repeated


def test_a_repeated_run_writes_identical_logs(train_tiny, uninterrupted):
    torch.rand(7)  # whatever drew random numbers before
    assert_same_run(train_tiny(reward=some_reward, **DEMANDING), uninterrupted)


def test_a_repeated_run_with_a_trained_reward_writes_identical_logs(train_tiny, with_trained_reward):
    torch.rand(7)
    again = train_tiny(reward={"generative": 1.0, "length": 0.1}, **DEMANDING)
    assert again.text("reward/calibration.json") == with_trained_reward.text("reward/calibration.json")
    assert_same_run(again, with_trained_reward)


def test_another_seed_is_another_run(train_tiny, uninterrupted):
    other = train_tiny(reward=some_reward, seed=1, **DEMANDING)
    for name in LOGS:
        assert other.text(name) != uninterrupted.text(name)


def test_the_settings_were_as_demanding_as_they_say(uninterrupted):
    assert len(set(uninterrupted.metrics("beta"))) == 4
    assert len(set(uninterrupted.metrics("alpha"))) > 2
    assert len(set(uninterrupted.metrics("learning_rate"))) == 4
    assert all(value.count_nonzero() for value in uninterrupted.adapter().values())


# ---- continued


@pytest.mark.parametrize("reward", ["generative", "judge"])
def test_prompts_met_again_after_a_resume_are_scored_as_if_it_had_never_been(train_tiny, tmp_path, reward):
    # two steps an epoch: in the third the prompts' reference replies have been scored before, but not by the resumed run
    settings = {**DEMANDING, "data.max_prompts": 4, "max_steps": 3, "epochs": 2, "reward_model.max_pairs": 8}
    whole = train_tiny(reward={reward: 1.0}, **settings)
    prompts = [line["prompt_id"] for line in whole.lines("samples.jsonl")]
    assert set(prompts[4:]) < set(prompts[:4])
    folder = cut_back(whole, 2, tmp_path / "again")
    assert_same_run(train_tiny(resume=True, reward={reward: 1.0}, output_dir=str(folder), **settings), whole)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_continued_after_any_step_equals_the_uninterrupted_one(train_tiny, uninterrupted, tmp_path, step):
    folder = cut_back(uninterrupted, step, tmp_path / "run")
    assert_same_run(train_tiny(resume=True, reward=some_reward, output_dir=str(folder), **DEMANDING), uninterrupted)


def test_a_run_that_failed_goes_on_once_the_cause_is_mended(train_tiny, tiny_trainer, uninterrupted, tmp_path):
    settings = {**DEMANDING, "output_dir": str(tmp_path / "run")}
    with pytest.raises(RewardError, match="the scorer went away"):
        tiny_trainer(reward=failing_at(3), **settings).train()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    run = train_tiny(resume=True, reward=some_reward, **settings)
    assert_same_run(run, uninterrupted)
    info = run.json("run.json")
    assert info["status"] == "finished"
    assert not info.get("error")


def test_a_run_with_a_trained_reward_continues_without_training_it_again(train_tiny, with_trained_reward, tmp_path):
    folder = cut_back(with_trained_reward, 2, tmp_path / "run")
    before = (folder / "events.jsonl").read_text(encoding="utf-8").count("reward_training")
    run = train_tiny(resume=True, reward={"generative": 1.0, "length": 0.1}, output_dir=str(folder), **DEMANDING)
    assert_same_run(run, with_trained_reward)
    assert run.text("events.jsonl").count("reward_training") == before > 0


def test_a_run_with_somebody_elses_reward_adapter_continues(train_tiny, with_trained_reward, tmp_path):
    settings = {**DEMANDING, "reward": {"generative": 1.0, "length": 0.1}, "reward_model.path": str(with_trained_reward.path / "reward")}
    borrowed = train_tiny(**settings)
    assert_same_run(borrowed, with_trained_reward)
    folder = cut_back(borrowed, 2, tmp_path / "run")
    assert_same_run(train_tiny(resume=True, output_dir=str(folder), **settings), with_trained_reward)


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(train_tiny, uninterrupted, tmp_path):
    folder = cut_back(uninterrupted, 3, tmp_path / "run")
    weights = folder / "checkpoints" / "step-00000003" / "policy" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    run = train_tiny(resume=True, reward=some_reward, output_dir=str(folder), **DEMANDING)
    assert_same_run(run, uninterrupted)
    assert [line["step"] for line in run.lines("events.jsonl") if line["kind"] == "step_time"] == [1, 2, 3, 4, 3, 4]


def test_continuing_a_finished_run_changes_nothing(train_tiny, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted.path, folder)
    assert_same_run(train_tiny(resume=True, reward=some_reward, output_dir=str(folder), **DEMANDING), uninterrupted)


def test_a_run_without_a_whole_checkpoint_cannot_continue(tiny_trainer, uninterrupted, tmp_path):
    folder = cut_back(uninterrupted, 1, tmp_path / "run")
    (folder / "checkpoints" / "step-00000001" / "state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        tiny_trainer(reward=some_reward, output_dir=str(folder), **DEMANDING).train(resume_from_checkpoint=True)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match=r"has no checkpoint to go on from\. Train it again in another output_dir"):
        tiny_trainer(reward=some_reward, output_dir=str(folder), **DEMANDING).train(resume_from_checkpoint=True)


def test_a_run_that_ended_during_the_reward_has_no_checkpoint_to_go_on_from(tiny_trainer, with_trained_reward, tmp_path):
    folder = cut_back(with_trained_reward, 0, tmp_path / "run")
    shutil.rmtree(folder / "reward")
    with pytest.raises(ValueError, match="has no checkpoint to go on from"):
        tiny_trainer(reward={"generative": 1.0}, output_dir=str(folder), **DEMANDING).train(resume_from_checkpoint=True)


def test_an_interrupted_run_is_marked_stopped_and_continues(train_tiny, tiny_trainer, uninterrupted, tmp_path):
    def interrupted(completion_ids, **columns):
        raise KeyboardInterrupt

    settings = {**DEMANDING, "output_dir": str(cut_back(uninterrupted, 2, tmp_path / "run"))}
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(reward=interrupted, **settings).train(resume_from_checkpoint=True)
    assert '"status": "stopped"' in (tmp_path / "run" / "run.json").read_text(encoding="utf-8")
    assert_same_run(train_tiny(resume=True, reward=some_reward, **settings), uninterrupted)


def test_continuing_needs_the_folder_of_a_run(tiny_trainer, tmp_path):
    with pytest.raises(ValueError, match="resume_from_checkpoint needs output_dir"):
        tiny_trainer(output_dir=None).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is not a run directory"):
        tiny_trainer(output_dir=str(tmp_path)).train(resume_from_checkpoint=True)
    assert list(tmp_path.iterdir()) == []


def test_save_steps_say_which_steps_can_be_gone_on_from(train_tiny):
    run = train_tiny(max_steps=5, save_steps=2)
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004", "step-00000005"]
    only_last = train_tiny(max_steps=2, save_steps=0)
    assert [path.name for path in (only_last.path / "checkpoints").iterdir()] == ["step-00000002"]
