"""The same settings give the same run to the byte: repeated, interrupted and continued, after any step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import assert_same_run

from gemma_grpo.checkpoint import CheckpointError
from gemma_grpo.grpo import resuming
from gemma_grpo.grpo.resuming import ResumeError
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.reward.base import RewardError
from gemma_grpo.stopping import Stopped

DEMANDING: dict[str, Any] = {
    "max_steps": 4,
    "save_steps": 1,
    "keep_checkpoints": None,
    "planning_steps": 2,
    "lora.dropout": 0.1,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_updates": 2,
    "kl.ref_target": 0.001,
    "entropy.threshold": 2.0,
    "evaluation.num_prompts": 3,
}
"""Everything that has a memory: Adam, the KL and the entropy controller, the schedule, dropout, the order of the prompts."""


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
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert other.text(name) != uninterrupted.text(name)


def test_the_settings_were_as_demanding_as_they_say(uninterrupted):
    assert len(set(uninterrupted.metrics("beta"))) == 4
    assert len(set(uninterrupted.metrics("alpha"))) > 2
    assert len(set(uninterrupted.metrics("learning_rate"))) > 2  # a step whose last pass was left out shows the rate before it
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


def test_a_finished_run_has_nothing_to_do_and_no_file_of_it_is_changed(tiny_trainer, uninterrupted, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted.path, folder)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    trainer = tiny_trainer(reward=some_reward, output_dir=str(folder), **DEMANDING)
    assert trainer.train(resume_from_checkpoint=True) == uninterrupted.evaluation
    assert f"nothing to do: {folder} finished at step 4" in capsys.readouterr().out.replace("\n", "")
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()} == before


def test_a_finished_run_goes_on_when_it_is_made_longer(train_tiny, tmp_path):
    settings = {"save_steps": 1, "reward": some_reward, "data.max_prompts": 8, "epochs": 2.0, "optimizer.schedule": "constant"}
    whole = train_tiny(max_steps=3, **settings)
    shorter = train_tiny(max_steps=2, output_dir=str(tmp_path / "run"), **settings)
    assert_same_run(train_tiny(resume=True, max_steps=3, output_dir=str(shorter.path), **settings), whole)
    assert "max_steps changed from 2 to 3" in whole_text(shorter.path / "events.jsonl")


def whole_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_a_run_without_a_whole_checkpoint_cannot_continue(tiny_trainer, uninterrupted, tmp_path):
    folder = cut_back(uninterrupted, 1, tmp_path / "run")
    (folder / "checkpoints" / "step-00000001" / "state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"no usable checkpoint in .*; 1 damaged"):
        tiny_trainer(reward=some_reward, output_dir=str(folder), **DEMANDING).train(resume_from_checkpoint=True)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(train_tiny, uninterrupted, tmp_path):
    folder = cut_back(uninterrupted, 3, tmp_path / "run")
    (folder / "checkpoints" / "step-00000003" / "optimizer.safetensors").write_bytes(b"")
    run = train_tiny(resume=True, reward=some_reward, output_dir=str(folder), **DEMANDING)
    assert_same_run(run, uninterrupted)
    assert "step-00000003 damaged (optimizer.safetensors: size 0, not" in run.text("events.jsonl")
    assert "using step-00000002" in run.text("events.jsonl")


def test_a_run_killed_before_its_first_checkpoint_begins_again(train_tiny, uninterrupted, tmp_path):
    folder = cut_back(uninterrupted, 0, tmp_path / "run")
    assert_same_run(train_tiny(resume=True, reward=some_reward, output_dir=str(folder), **DEMANDING), uninterrupted)


@pytest.mark.parametrize("left", ["nothing", "the adapter alone", "all of it"])
def test_a_run_that_ended_around_its_rewards_training_continues(train_tiny, with_trained_reward, tmp_path, left):
    folder = cut_back(with_trained_reward, 0, tmp_path / "run")
    if left == "nothing":
        shutil.rmtree(folder / "reward")
    elif left == "the adapter alone":
        (folder / "reward" / "calibration.json").unlink()
    run = train_tiny(resume=True, reward={"generative": 1.0, "length": 0.1}, output_dir=str(folder), **DEMANDING)
    assert_same_run(run, with_trained_reward)
    assert run.text("reward/calibration.json") == with_trained_reward.text("reward/calibration.json")


# ---- with other settings, other data, another machine


REFUSED = {"learning_rate": (0.02, 0.1), "lora.r": (8, 4), "planning_steps": (2, 1), "kl.beta": (0.05, 0.1), "seed": (0, 1)}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_steps_were_made_with_cannot_change(tiny_trainer, uninterrupted, tmp_path, name):
    folder = cut_back(uninterrupted, 2, tmp_path / "run")
    before = (folder / "metrics.jsonl").read_bytes()
    began = dict(resuming._leaves(uninterrupted.trainer.config.model_dump()))[name]
    changed = {**DEMANDING, name: REFUSED[name][began == REFUSED[name][0]]}
    with pytest.raises(ResumeError, match=rf"cannot go on with other settings:\n  {name}: the run began with {began}, now it is"):
        tiny_trainer(reward=some_reward, output_dir=str(folder), **changed).train(resume_from_checkpoint=True)
    assert (folder / "metrics.jsonl").read_bytes() == before
    RunDirectory.open(folder).close()  # the lock is free


def test_other_data_is_refused(tiny_trainer, uninterrupted, tmp_path):
    folder, rows = cut_back(uninterrupted, 2, tmp_path / "run"), list(uninterrupted.trainer._dataset)
    for other in ([{**rows[0], "chosen": rows[0]["chosen"] + " indeed"}, *rows[1:]], rows[1:], [*rows[1:], rows[0]]):
        with pytest.raises(ResumeError, match=r"the dataset fingerprint [0-9a-f]{12} does not match [0-9a-f]{12}, with which .* began"):
            tiny_trainer(reward=some_reward, dataset=other, output_dir=str(folder), **DEMANDING).train(resume_from_checkpoint=True)


def test_what_keeps_it_from_being_the_same_to_the_bit_is_said(train_tiny, uninterrupted, tmp_path):
    folder = cut_back(uninterrupted, 3, tmp_path / "run")
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    threads = info["environment"]["threads"]
    info["environment"]["threads"] = threads + 7
    (folder / "run.json").write_text(json.dumps(info), encoding="utf-8")
    run = train_tiny(resume=True, reward=some_reward, output_dir=str(folder), **DEMANDING)
    assert f"not bit for bit: threads {threads + 7} -> {threads}" in run.text("events.jsonl")


def test_an_interrupted_run_is_marked_stopped_and_continues(train_tiny, tiny_trainer, uninterrupted, tmp_path):
    def interrupted(completion_ids, **columns):
        raise KeyboardInterrupt

    settings = {**DEMANDING, "output_dir": str(cut_back(uninterrupted, 2, tmp_path / "run"))}
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(reward=interrupted, **settings).train(resume_from_checkpoint=True)
    assert '"status": "stopped"' in (tmp_path / "run" / "run.json").read_text(encoding="utf-8")
    assert_same_run(train_tiny(resume=True, reward=some_reward, **settings), uninterrupted)


@pytest.mark.parametrize("share", [0.01, 0.06, 0.1, 0.13, 0.2, 0.24, 0.31, 0.38, 0.45, 0.52, 0.6, 0.66, 0.73, 0.8, 0.87, 0.94, 0.99])
def test_a_run_stopped_between_any_two_pieces_of_work_loses_no_finished_step(
    train_tiny, tiny_trainer, uninterrupted, tmp_path, stop_at, share
):
    settings = {**DEMANDING, "save_steps": 0, "reward": some_reward}
    readings = stop_at(10**9)
    train_tiny(max_minutes=1, **settings)
    assert len(readings) > 100
    stop_at(int(share * (len(readings) - 1)))
    folder = {"output_dir": str(tmp_path / "run")}
    with pytest.raises(Stopped, match="its time is up"):
        tiny_trainer(max_minutes=1, **settings, **folder).train()
    info = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert info["status"] == "stopped"
    finished = info.get("steps", 0)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == finished
    if finished:
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{finished:08d}"]
    assert_same_run(train_tiny(resume=True, **settings, **folder), uninterrupted)


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


# ---- the base


def flip_a_bit(file: Path, name: str) -> None:
    """Of the last number of a tensor, the lowest one: the weight stays finite, and nearly what it was."""
    data = bytearray(file.read_bytes())
    header = int.from_bytes(data[:8], "little")
    _, end = json.loads(data[8 : 8 + header])[name]["data_offsets"]
    data[8 + header + end - 4] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_a_base_with_one_flipped_bit_is_refused_by_its_tensors_name(tiny_trainer, train_tiny, small_model_dir, tmp_path, name):
    base, settings = tmp_path / "base", {"reward": some_reward, "save_steps": 1, "output_dir": str(tmp_path / "run")}
    shutil.copytree(small_model_dir, base)
    train_tiny(model_name=str(base), max_steps=1, **settings)
    flip_a_bit(base / "model.safetensors", name)
    message = rf"the base {base} is not what {tmp_path / 'run'} began with: {name} differs\. A damaged file, or another version"
    with pytest.raises(ResumeError, match=message):
        tiny_trainer(model_name=str(base), max_steps=2, **settings).train(resume_from_checkpoint=True)
    flip_a_bit(base / "model.safetensors", name)  # mended
    assert len(train_tiny(model_name=str(base), max_steps=2, resume=True, **settings).lines("metrics.jsonl")) == 2


def test_a_run_whose_record_of_the_base_is_unreadable_says_so(tiny_trainer, uninterrupted, tmp_path):
    folder = cut_back(uninterrupted, 2, tmp_path / "run")
    (folder / "base.json").write_text("[", encoding="utf-8")
    with pytest.raises(ResumeError, match=r"base\.json cannot be read .* Restore it, or delete it if you know that the base is unchanged"):
        tiny_trainer(reward=some_reward, output_dir=str(folder), **DEMANDING).train(resume_from_checkpoint=True)
    (folder / "base.json").unlink()
    tiny_trainer(reward=some_reward, output_dir=str(folder), **DEMANDING).train(resume_from_checkpoint=True)
    assert (folder / "base.json").read_bytes() == (uninterrupted.path / "base.json").read_bytes()


def test_a_checkpoint_says_of_what_it_is(uninterrupted):
    folder = uninterrupted.path / "checkpoints"
    origins = [json.loads((path / "state.json").read_text(encoding="utf-8"))["origin"] for path in folder.iterdir()]
    assert origins[0].keys() == {"data", "base", "settings"}
    assert origins[0]["data"] == uninterrupted.json("run.json")["fingerprint"]
    assert all(origin == origins[0] for origin in origins)
