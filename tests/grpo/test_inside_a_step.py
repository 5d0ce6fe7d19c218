"""A run that was stopped inside a step goes on inside it: what was sampled, scored and learned is not done again, and nothing differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stopped_runs import StopAt, assert_same_run

from gemma_grpo.checkpoint import CheckpointError, read_checkpoint
from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.local import LocalEngine
from gemma_grpo.stopping import Stopped, listening

STEPS = 4
MANY: dict[str, Any] = {
    "max_steps": STEPS,
    "save_steps": 1,
    "keep_checkpoints": None,
    "planning_steps": 3,
    "lora.dropout": 0.1,
    "optimizer.schedule": "cosine",
    "kl.ref_target": 0.001,
    "kl.step_limit": 1.0,
    "entropy.threshold": 2.0,
    "memory.token_budget": 200,
    "evaluation.num_prompts": 2,
}
"""Three passes, each of several pieces, so that there are places between them and inside them."""


def some_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(ids) / len(ids) / 100 for ids in completion_ids]


@pytest.fixture(scope="module")
def whole(train_tiny: Callable[..., Any]) -> Any:
    return train_tiny(reward=some_reward, **MANY)


@pytest.fixture
def checks(train_tiny: Callable[..., Any], stop_at: StopAt) -> list[str]:
    """What the run is doing at each of its checks."""
    doing = stop_at(10**9)
    train_tiny(reward=some_reward, max_minutes=1, **MANY)
    return doing[:]


def spans(doing: list[str], name: str) -> list[range]:
    """Where a phase is under way, one range of checks for each time."""
    starts = [index for index, now in enumerate(doing) if now == name and (index == 0 or doing[index - 1] != name)]
    return [range(start, next((i for i in range(start, len(doing)) if doing[i] != name), len(doing))) for start in starts]


def stopped(tiny_trainer: Callable[..., Any], stop_at: StopAt, at: int, folder: Path, **settings: Any) -> Any:
    stop_at(at)
    with pytest.raises(Stopped, match="its time is up"):
        tiny_trainer(max_minutes=1, output_dir=str(folder), **settings).train()
    stop_at(10**9)
    return read_checkpoint(max((folder / "checkpoints").iterdir()))


def phases_of(run: Any, step: int) -> list[list[str]]:
    return [list(line["seconds"]) for line in run.lines("events.jsonl") if line["kind"] == "step_time" and line["step"] == step]


@pytest.mark.parametrize(
    ("phase", "share", "kept"),
    [
        ("reward", 0.0, ["rollout"]),
        ("reference", 0.0, ["rollout"]),
        ("update", 0.0, ["rollout", "reward", "reference"]),
        ("update", 0.4, ["rollout", "reward", "reference"]),
        ("update", 0.7, ["rollout", "reward", "reference"]),
        ("update", 0.99, ["rollout", "reward", "reference"]),
    ],
)
def test_what_a_stopped_step_had_is_not_done_again(
    train_tiny: Callable[..., Any], tiny_trainer: Callable[..., Any], whole: Any, checks: list[str], stop_at: StopAt, tmp_path: Path,
    phase: str, share: float, kept: list[str],
) -> None:  # fmt: skip
    third = spans(checks, phase)[2]
    found = stopped(tiny_trainer, stop_at, third[int(share * len(third))], tmp_path / "run", reward=some_reward, **MANY)
    assert found.step == 2
    assert found.rollout
    run = train_tiny(resume=True, reward=some_reward, output_dir=str(tmp_path / "run"), **MANY)
    assert_same_run(run, whole)
    left = [name for name in ("rollout", "reward", "reference", "update") if name not in kept]
    assert phases_of(run, 3) == [left]


@pytest.mark.parametrize(("planning_steps", "places"), [(3, {0, 1, 2}), (1, {0, 1})], ids=["three passes", "one pass, measured after it"])
def test_an_update_can_be_left_before_between_and_after_its_passes(
    train_tiny: Callable[..., Any], tiny_trainer: Callable[..., Any], stop_at: StopAt, tmp_path: Path, planning_steps: int, places: set[int]
) -> None:
    settings = {**MANY, "planning_steps": planning_steps, "reward": some_reward}
    doing = stop_at(10**9)
    train_tiny(max_minutes=1, **settings)
    third, passes = spans(doing[:], "update")[2], []
    for at in range(third.start, third.stop, max(1, len(third) // 10)):
        found = stopped(tiny_trainer, stop_at, at, tmp_path / f"run-{at}", **settings)
        passes.append(found.state["under_way"].get("count", 0))
    assert passes == sorted(passes)
    assert set(passes) == places


def test_a_stop_before_the_first_step_is_over_keeps_its_rollout_too(
    train_tiny: Callable[..., Any], tiny_trainer: Callable[..., Any], whole: Any, checks: list[str], stop_at: StopAt, tmp_path: Path
) -> None:
    first = spans(checks, "update")[0]
    found = stopped(tiny_trainer, stop_at, first[len(first) // 2], tmp_path / "run", reward=some_reward, **MANY)
    assert found.path.name == "step-00000000"
    assert_same_run(train_tiny(resume=True, reward=some_reward, output_dir=str(tmp_path / "run"), **MANY), whole)


def test_a_run_that_is_given_little_more_than_a_rollout_at_a_time_still_comes_to_its_end(
    train_tiny: Callable[..., Any], tiny_trainer: Callable[..., Any], whole: Any, checks: list[str], stop_at: StopAt, tmp_path: Path
) -> None:
    before_the_first, rollout = spans(checks, "rollout")[0].start, max(len(one) for one in spans(checks, "rollout"))
    settings, times = {"reward": some_reward, "output_dir": str(tmp_path / "run"), **MANY}, 0
    while not (tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}").is_dir():
        stop_at(before_the_first + rollout + 6)
        with pytest.raises(Stopped):
            tiny_trainer(max_minutes=1, **settings).train(resume_from_checkpoint=times > 0)
        times += 1
        assert times < 100
    stop_at(10**9)
    assert times > STEPS
    assert_same_run(train_tiny(resume=True, **settings), whole)


def test_a_reward_that_failed_scores_the_same_completions_once_it_is_mended(
    train_tiny: Callable[..., Any], tiny_trainer: Callable[..., Any], whole: Any, tmp_path: Path
) -> None:
    calls = 0

    def some_reward_that_fails(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("the scorer went away")
        return some_reward(completion_ids)

    some_reward_that_fails.__name__ = "some_reward"
    settings = {"output_dir": str(tmp_path / "run"), **MANY}
    with pytest.raises(ValueError, match="the scorer went away"):
        tiny_trainer(reward=some_reward_that_fails, **settings).train()
    run = train_tiny(resume=True, reward=some_reward, **settings)
    assert_same_run(run, whole)
    assert phases_of(run, 3) == [["reward", "reference", "update"]]


def test_a_rollout_of_other_prompts_is_refused(
    tiny_trainer: Callable[..., Any], checks: list[str], stop_at: StopAt, tmp_path: Path
) -> None:
    from gemma_grpo.grpo.progress import from_tensors

    third = spans(checks, "update")[2]
    found = stopped(tiny_trainer, stop_at, third[0], tmp_path / "run", reward=some_reward, **MANY)
    trainer = tiny_trainer(reward=some_reward, **MANY)
    trainer.dry_run()
    prompts = trainer._prompts_of_step(2)
    again = from_tensors(found.rollout, found.state["under_way"], prompts, trainer.model, step=2)
    assert [group.prompt for group in again.groups] == list(prompts)
    with pytest.raises(ValueError, match="the rollout kept for step 3 was sampled for other prompts"):
        from_tensors(found.rollout, found.state["under_way"], prompts[::-1], trainer.model, step=2)


def test_a_checkpoint_of_another_run_is_refused(train_tiny: Callable[..., Any], tiny_trainer: Callable[..., Any], tmp_path: Path) -> None:
    import shutil

    settings: Mapping[str, Any] = {"max_steps": 2, "save_steps": 1, "reward": some_reward}
    one, other = train_tiny(**settings), train_tiny(seed=1, **settings)
    folder = tmp_path / "run"
    shutil.copytree(one.path, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000002")
    shutil.copytree(other.path / "checkpoints" / "step-00000002", folder / "checkpoints" / "step-00000002")
    (folder / "evaluation.json").unlink(missing_ok=True)
    (folder / "run.json").write_text((folder / "run.json").read_text().replace('"finished"', '"stopped"'))
    with pytest.raises(CheckpointError, match=r"step-00000002 is of another run: its settings are not this run's\."):
        tiny_trainer(output_dir=str(folder), **settings).train(resume_from_checkpoint=True)


def test_a_stop_is_looked_for_at_every_token_sampled(tiny_trainer: Callable[..., Any], stop_at: StopAt) -> None:
    trainer = tiny_trainer(reward=some_reward)
    prompts = trainer.dry_run()["prompts"]
    engine, counts = LocalEngine(trainer.model, stop_ids=()), []
    for length in (6, 26):
        doing = stop_at(10**9)
        with listening(max_minutes=1):
            engine.sample(prompts, SamplingParams(num_generations=2, max_completion_length=length, seed=0, step=0))
        counts.append(len(doing))
    assert counts[1] - counts[0] == 20


# ---- the reward adapter's training


TRAINED: dict[str, Any] = {
    **{"max_steps": 1, "reward": {"generative": 1.0}, "lora.dropout": 0.1},
    **{"reward_model.batch_size": 4, "reward_model.max_pairs": 16, "evaluation.num_prompts": 2, "save_steps": 2},
}
"""Four updates."""


@pytest.fixture(scope="module")
def with_trained_reward(train_tiny: Callable[..., Any]) -> Any:
    return train_tiny(**TRAINED)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_the_reward_adapters_training_goes_on_after_its_last_update(
    train_tiny: Callable[..., Any], tiny_trainer: Callable[..., Any], with_trained_reward: Any, stop_at: StopAt, tmp_path: Path,
    share: float,
) -> None:  # fmt: skip
    doing = stop_at(10**9)
    train_tiny(max_minutes=1, **TRAINED)
    (training,) = spans(["reward training" if now == "saving" else now for now in doing], "reward training")
    stop_at(training[int(share * len(training))])
    with pytest.raises(Stopped):
        tiny_trainer(max_minutes=1, output_dir=str(tmp_path / "run"), **TRAINED).train()
    stop_at(10**9)
    run = train_tiny(resume=True, output_dir=str(tmp_path / "run"), **TRAINED)
    assert_same_run(run, with_trained_reward)
    assert run.text("reward/calibration.json") == with_trained_reward.text("reward/calibration.json")
    reward, other = run.adapter("reward"), with_trained_reward.adapter("reward")
    assert all(torch.equal(reward[name], value) for name, value in other.items())
    assert [line["update"] for line in run.lines("events.jsonl") if line["kind"] == "reward_training"] == [1, 2, 3, 4]
    assert not (run.path / "reward" / "checkpoints").exists()


# ---- every step of ten configurations


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "planning cycle": {"planning_steps": 4, "kl.step_limit": None},
    "accumulation": {"gradient_accumulation_steps": 3, "memory.token_budget": 150, "epochs": 9.0},
    "epoch boundary and a short last batch": {"data.max_prompts": 5, "epochs": 9.0, "max_steps": 7},
    "KL controller, and looks": {"kl.ref_target": 0.001, "kl.hard_stop_steps": 0, "witness.every": 2, "witness.num_prompts": 2},
    "KL in the reward": {"kl.placement": "reward", "advantage.scale": "none"},
    "dropout": {"lora.dropout": 0.3},
    "cosine with warm-up": {"optimizer.schedule": "cosine", "optimizer.warmup_updates": 3, "optimizer.weight_decay": 0.1},
    "bfloat16": {"precision": "bf16"},
    "step limit that takes back": {"kl.step_limit": 0.0005, "learning_rate": 3e-2},
    "entropy, several rewards, GDPO": {
        "entropy.threshold": 2.0, "advantage.aggregation": "gdpo", "reward": {"length": 1.0, "empty": 0.3, "judge": 0.2}
    },
}  # fmt: skip
PLACES = 22


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_stopped_anywhere_and_continued_it_is_the_same_run(
    train_tiny: Callable[..., Any], tiny_trainer: Callable[..., Any], stop_at: StopAt, tmp_path: Path, name: str
) -> None:
    settings = {"max_steps": 6, "save_steps": 2, "reward": some_reward, "evaluation.num_prompts": 2, **CONFIGURATIONS[name]}
    doing = stop_at(10**9)
    expected = train_tiny(max_minutes=1, **settings)
    doing, tried, steps = doing[:], 0, set()
    # every step's middle of every phase, and places spread over the whole run
    middles = [one[len(one) // 2] for phase in ("rollout", "reward", "update") for one in spans(doing, phase)]
    spread = [round(index * (len(doing) - 1) / (PLACES - 1)) for index in range(PLACES)]
    for at in sorted({*middles, *spread}):
        folder = tmp_path / f"at-{at}"
        stop_at(at)
        with suppress(Stopped):
            tiny_trainer(max_minutes=1, output_dir=str(folder), **settings).train()
        stop_at(10**9)
        if not (folder / "recipe.yaml").is_file():
            continue  # stopped before there was a run
        steps.add(len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()))
        assert_same_run(train_tiny(resume=True, output_dir=str(folder), **settings), expected)
        tried += 1
    assert tried >= 20, "too few places: 10 configurations are 200"
    assert steps >= set(range(settings["max_steps"]))  # stopped in every step


def test_what_is_kept_is_safetensors_and_json_alone(
    tiny_trainer: Callable[..., Any], checks: list[str], stop_at: StopAt, tmp_path: Path
) -> None:
    third = spans(checks, "update")[2]
    found = stopped(tiny_trainer, stop_at, third[-1], tmp_path / "run", reward=some_reward, **MANY)
    kept = load_file(found.path / "rollout.safetensors")
    assert {name for name in kept if not name.startswith("gradient/")} == {
        *("completion_ids", "completion_lengths", "sampling_logprobs", "stopped", "rewards", "parts", "advantages", "ref_logprobs"),
        "old_logprobs",
    }
    assert kept["rewards"].dtype == torch.float64  # the logs show what Python added up
