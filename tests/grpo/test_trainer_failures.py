"""Bad input to the trainer: what is wrong, where and how to mend it; and nothing half-written."""

from __future__ import annotations

import gzip
import json
import math
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from gemma_grpo import GRPOTrainer
from gemma_grpo.checkpoint import CheckpointError
from gemma_grpo.config import ConfigError
from gemma_grpo.data.sources import DataError
from gemma_grpo.monitor.durable import RunDirectoryError
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.reward.base import RewardError

NOWHERE: dict[str, Any] = {"model_name": "/nowhere/no-model"}
"""A model that cannot be loaded: what is refused with it was refused before."""
PROMPT_ROWS = [{"prompt": f"question {index}?"} for index in range(16)]


def everything_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, r"num_generations: is 1; must be at least 2\. Default 8\."),
        ({"learning_rate": 0}, r"learning_rate: is 0; must be above 0"),
        (
            {"kl": {"beta": 0.0}},
            r"kl\.beta: is 0\.0, outside \[0\.005, 1\.0\] \(kl\.beta_min, kl\.beta_max\).*kl\.ref_target=null.*kl\.placement=off",
        ),
        ({"reward": {"length": math.nan}}, r"reward\.length: is nan; must be finite"),
        ({"reward": {}}, r"reward: names no reward"),
        ({"batchsize": 2}, r"batchsize: no such setting\. Did you mean 'batch_size'\?"),
    ],
)
def test_a_wrong_setting_is_refused_at_once(settings, message):
    with pytest.raises(ConfigError, match=message):
        GRPOTrainer(**NOWHERE, dataset=PROMPT_ROWS, **settings)


def test_all_wrong_settings_are_named_together():
    with pytest.raises(ConfigError) as caught:
        GRPOTrainer(**NOWHERE, dataset=PROMPT_ROWS, num_generations=1, temperature=-1, **{"lora.r": 0})
    assert {problem.key for problem in caught.value.problems} == {"num_generations", "temperature", "lora.r"}


@pytest.mark.parametrize("reward", ["lenght", {"lenght": 1.0, "empty": 1.0}])
def test_an_unknown_reward_is_refused_at_once_with_the_nearest_name(reward):
    with pytest.raises(ValueError, match=r"unknown reward 'lenght'\. Did you mean 'length'\? Known are "):
        GRPOTrainer(**NOWHERE, dataset=PROMPT_ROWS, reward=reward)


# ---- data and folders, before the model is loaded


def lfs_pointer() -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "no such file"),
        ("pointer.jsonl", lfs_pointer(), "Git"),
        ("cut.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 500, mtime=0)[:60], "breaks off or is damaged"),
        ("empty.jsonl", b"", "rows|empty"),
        ("other.jsonl", b'{"text": "a"}\n', "none of 1 rows is usable"),
    ],
)
def test_unusable_data_is_refused_before_the_model_is_loaded(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    before = everything_in(tmp_path)
    trainer = GRPOTrainer(**NOWHERE, dataset=str(path), reward="length", output_dir=str(tmp_path / "run"))
    with pytest.raises(DataError, match=message) as caught:
        trainer.train()
    assert name in str(caught.value)
    assert everything_in(tmp_path) == before


def test_an_output_folder_that_is_a_file_is_refused_before_the_model_is_loaded(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(RunDirectoryError, match="is a file; a run needs a folder"):
        GRPOTrainer(**NOWHERE, dataset=PROMPT_ROWS, reward="length", output_dir=str(path)).train()
    assert path.read_text(encoding="utf-8") == "mine"


def test_an_output_folder_that_holds_a_run_is_refused_before_the_model_is_loaded(train_tiny, tmp_path):
    finished = train_tiny(max_steps=1)
    folder = tmp_path / "run"
    shutil.copytree(finished.path, folder)
    before = {name: (folder / name).read_bytes() for name in everything_in(folder) if (folder / name).is_file()}
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        GRPOTrainer(**NOWHERE, dataset=PROMPT_ROWS, reward="length", output_dir=str(folder)).train()
    assert {name: (folder / name).read_bytes() for name in everything_in(folder) if (folder / name).is_file()} == before


def test_prompts_alone_are_refused_as_the_rewards_data_before_the_model_is_loaded(tmp_path):
    trainer = GRPOTrainer(**NOWHERE, dataset=PROMPT_ROWS, output_dir=str(tmp_path / "run"))
    message = r"has prompts but no preference pairs, so there is nothing to train the reward on\. Give reward="
    for method in (trainer.train, trainer.train_reward):
        with pytest.raises(DataError, match=message):
            method()
    assert everything_in(tmp_path) == []


def test_training_only_the_reward_needs_pairs_whatever_the_reward(tiny_trainer, tmp_path):
    trainer = tiny_trainer(dataset=PROMPT_ROWS, reward="length", output_dir=str(tmp_path / "run"))
    with pytest.raises(DataError, match="has prompts but no preference pairs"):
        trainer.train_reward()
    assert everything_in(tmp_path) == []


def test_pairs_that_are_all_too_long_are_counted_and_the_limit_named(tiny_trainer, tmp_path):
    trainer = tiny_trainer(reward=None, output_dir=str(tmp_path / "run"), **{"reward_model.max_length": 60})
    with pytest.raises(DataError, match=r"no training pair is left of 24 rows.*'pair_too_long': 24.*reward_model\.max_length \(60\)"):
        trainer.train()
    assert everything_in(tmp_path) == []


def test_a_model_that_cannot_be_loaded_leaves_nothing_behind(tmp_path):
    with pytest.raises((OSError, ValueError), match="no-model"):
        GRPOTrainer(**NOWHERE, dataset=PROMPT_ROWS, reward="length", output_dir=str(tmp_path / "run")).train()
    assert everything_in(tmp_path) == []


def test_a_folder_that_is_no_reward_adapter_is_refused(tiny_trainer, train_tiny, tmp_path):
    trainer = tiny_trainer(reward="generative", output_dir=str(tmp_path / "run"), **{"reward_model.path": str(tmp_path)})
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors"):
        trainer.train()
    policy = train_tiny(max_steps=1).path / "adapter"
    trainer = tiny_trainer(reward="generative", output_dir=str(tmp_path / "second"), **{"reward_model.path": str(policy)})
    with pytest.raises(ValueError, match=r"has no calibration\.json"):
        trainer.train()


# ---- while it runs


def not_a_number(completions, **columns):
    return [0.0, math.nan, *[0.0] * (len(completions) - 2)]


def too_few(completions, **columns):
    return [0.0]


def raising(completions, **columns):
    raise ZeroDivisionError("no replies")


def a_text(completions, **columns):
    return ["good"] * len(completions)


def needs_a_column(completions, answer, **columns):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (not_a_number, r"reward 'not_a_number' returned nan for 1 of 6 completions \(index 1, prompt \w+\)\. Return a finite number"),
        (too_few, r"reward 'too_few' returned 1 scores for 6 completions\. Return one score per completion\."),
        (raising, r"reward 'raising' raised ZeroDivisionError: no replies\."),
        (a_text, r"reward 'a_text' returned 'good' \(str\) for 6 of 6 completions \(first index 0, prompt \w+\)"),
        (needs_a_column, r"reward 'needs_a_column' needs 'answer', which the dataset does not have"),
    ],
)
def test_a_reward_that_fails_ends_the_run_as_failed_with_nothing_half_written(tiny_trainer, tmp_path, reward, message):
    folder = tmp_path / "run"
    with pytest.raises(RewardError, match=message):
        tiny_trainer(dataset=PROMPT_ROWS, reward=reward, output_dir=str(folder)).train()
    assert_failed_cleanly(folder, RewardError, steps=0)


def assert_failed_cleanly(folder: Path, error: type[Exception], steps: int) -> None:
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert info["status"] == "failed"
    assert info["error"].startswith(f"{error.__name__}: ")
    assert info["ended"] >= info["started"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert events[-1]["kind"] == "error"
    assert events[-1]["text"] == info["error"]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, steps + 1))
    left = everything_in(folder)
    assert not any(name in left for name in ("adapter", "evaluation.json", "reward/calibration.json", "reward/adapter_config.json"))
    assert not any(".saving" in name or ".tmp" in name or ".writer" in name for name in left)
    RunDirectory.open(folder).close()  # nobody holds it any more


def test_what_was_finished_before_a_failure_stays(tiny_trainer, tmp_path):
    calls = []

    def fails_later(completions, **columns):
        calls.append(1)
        return [0.0] if len(calls) == 3 else [float(len(completion[0]["content"])) for completion in completions]

    folder = tmp_path / "run"
    with pytest.raises(RewardError):
        tiny_trainer(reward=fails_later, max_steps=4, save_steps=1, output_dir=str(folder)).train()
    assert_failed_cleanly(folder, RewardError, steps=2)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_weights_that_diverge_are_found_and_named(tiny_trainer, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"logits are not finite|the loss is nan|is not finite"):
        tiny_trainer(learning_rate=1e36, output_dir=str(folder), **{"kl.step_limit": None, "optimizer.weight_decay": 1.0}).train()
    assert_failed_cleanly(folder, FloatingPointError, steps=0)


def test_a_reward_adapter_that_diverges_is_found_and_named(tiny_trainer, tmp_path):
    folder = tmp_path / "run"
    settings = {"reward_model.learning_rate": 2e37, "reward_model.batch_size": 2}
    # which of the two comes first depends on what overflows: both name the update and the setting
    found = r"reward adapter: (the loss is nan|a gradient is not finite) at update \d+\. Lower reward_model\.learning_rate"
    with pytest.raises(FloatingPointError, match=found):
        tiny_trainer(reward=None, output_dir=str(folder), **settings).train()
    assert_failed_cleanly(folder, FloatingPointError, steps=0)


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(tiny_trainer, tmp_path):
    # a checkpoint after each of 7 x 10^9 steps
    trainer = tiny_trainer(max_steps=None, epochs=1e9, save_steps=1, keep_checkpoints=None, output_dir=str(tmp_path / "run"))
    with pytest.raises(RunDirectoryError, match=r"MB free; the run needs about \d+ MB\. Free some room, or choose an output_dir"):
        trainer.train()
    assert everything_in(tmp_path) == []


@pytest.fixture
def largest_file():
    """Sets the largest size a file may have from now on, as a disk that fills up would; taken back afterwards."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_leaves_no_half_a_checkpoint(tiny_trainer, train_tiny, tmp_path, largest_file):
    settings = {"max_steps": 3, "save_steps": 1, "output_dir": str(tmp_path / "run")}
    calls = []

    def filling(completions, **columns):
        calls.append(1)
        if len(calls) == 2:
            largest_file(8_000)  # the logs still fit, an adapter of 11 kB does not
        return [float(len(completion[0]["content"])) for completion in completions]

    text = r"file too large: checkpoint step 2 not written in .*checkpoints; step 1 is intact, and --resume goes on from it\. Free some"
    with pytest.raises(CheckpointError, match=text):
        tiny_trainer(reward=filling, **settings).train()
    largest_file(resource.RLIM_INFINITY)
    assert_failed_cleanly(tmp_path / "run", CheckpointError, steps=2)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    continued = train_tiny(resume=True, reward=filling, **settings)
    assert continued.lines("metrics.jsonl")[-1]["step"] == 3


def test_two_runs_cannot_write_one_folder(tiny_trainer, tmp_path):
    folder, seen = tmp_path / "run", []

    def meanwhile(completions, **columns):
        with pytest.raises(RunDirectoryError, match="already holds a run"):
            tiny_trainer(output_dir=str(folder)).train()
        with pytest.raises(RunDirectoryError, match="is being written by process"):
            tiny_trainer(output_dir=str(folder)).train(resume_from_checkpoint=True)
        seen.append(1)
        return [float(len(completion[0]["content"])) for completion in completions]

    tiny_trainer(reward=meanwhile, max_steps=1, output_dir=str(folder)).train()
    assert seen
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
