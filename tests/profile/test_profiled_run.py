"""Whole runs with a profile: every second is in it, the tokens are the run's own, and the run is the one without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_grpo.config import build_config
from gemma_grpo.monitor.profile_table import profile_notes, profile_rows
from gemma_grpo.profile.recorder import PhaseWork
from gemma_grpo.shapes import ModelShape
from gemma_grpo.types import Completion, Prompt, RolloutGroup

PHASES = ["rollout", "reward", "reference", "update", "other"]
STEPS = 3
SHAPE = ModelShape("tiny", 32, 7, 4, 2, 16, 64, 363, 8, 1)


def profile_of(trainer: Any) -> dict[str, Any]:
    return dict(json.loads((Path(trainer.run_dir) / "profile.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def trainer(tiny_trainer: Callable[..., Any]) -> Any:
    trainer = tiny_trainer(max_steps=STEPS, planning_steps=2, **{"evaluation.num_prompts": 3})
    trainer.train(profile=True)
    return trainer


@pytest.fixture(scope="module")
def profile(trainer: Any) -> dict[str, Any]:
    return profile_of(trainer)


def test_every_second_of_the_session_is_in_it(profile: dict[str, Any]) -> None:
    assert list(profile["phases"]) == PHASES
    phases, outside = (sum(values) for values in ((one["seconds"] for one in profile["phases"].values()), profile["outside"].values()))
    assert phases == pytest.approx(profile["total"]["seconds"])
    assert phases + outside == pytest.approx(profile["session_seconds"])
    assert sum(one["share"] for one in profile["phases"].values()) == pytest.approx(1)
    assert all(value > 0 for value in profile["outside"].values())


def test_the_first_step_warms_up_and_is_left_out_of_the_sums(profile: dict[str, Any]) -> None:
    assert profile["steps"] == {"earlier": 0, "profiled": STEPS, "counted": [2, STEPS]}
    first, *others = profile["by_step"]
    assert profile["outside"]["first step, warm-up"] == pytest.approx(sum(first["seconds"].values()))
    for name in PHASES:
        assert profile["phases"][name]["seconds"] == pytest.approx(sum(step["seconds"][name] for step in others))


def test_the_phases_are_those_that_the_steps_logged(trainer: Any, profile: dict[str, Any]) -> None:
    events = [json.loads(line) for line in (Path(trainer.run_dir) / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [event["seconds"] for event in events if event["kind"] == "step_time"]
    assert [{name: step["seconds"][name] for name in PHASES[:-1]} for step in profile["by_step"]] == logged
    assert all(step["seconds"]["other"] > 0 for step in profile["by_step"])


def test_tokens_are_those_of_the_samples(trainer: Any, profile: dict[str, Any]) -> None:
    samples = [json.loads(line) for line in (Path(trainer.run_dir) / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = {prompt.prompt_id: len(prompt.token_ids) for prompt in trainer.data.prompts}
    sampled = sum(one["length"] for line in samples for one in line["completions"] if line["step"] > 1)
    read = sampled + sum(prompts[line["prompt_id"]] for line in samples if line["step"] > 1)
    found = {name: profile["phases"][name]["tokens"] for name in PHASES}
    assert found == {"rollout": sampled, "reward": 0, "reference": read, "update": 2 * read, "other": 0}


def test_no_phase_is_faster_than_its_floor(profile: dict[str, Any]) -> None:
    for name in ("rollout", "reference", "update"):
        one = profile["phases"][name]
        assert one["ratio"] == pytest.approx(one["seconds"] / one["floor_seconds"])
        assert one["ratio"] > 1
    assert profile["phases"]["reward"]["ratio"] is None  # a function's work is not counted
    assert profile["phases"]["other"]["ratio"] is None


def test_a_profiled_run_is_the_run_without_it(train_tiny: Callable[..., Any], trainer: Any) -> None:
    plain = train_tiny(max_steps=STEPS, planning_steps=2, **{"evaluation.num_prompts": 3, "lora.dropout": 0.0})
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (Path(trainer.run_dir) / name).read_text(encoding="utf-8") == plain.text(name)
    assert not (plain.path / "profile.json").exists()


def test_the_table_is_shown_at_the_end(tiny_trainer: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny_trainer(max_steps=1)
    trainer.train(profile=True)
    lines = capsys.readouterr().out.splitlines()
    header = next(
        index
        for index, line in enumerate(lines)
        if line.split() == ["phase", "seconds", "share", "floor", "x", "floor", "tokens", "tokens/s"]
    )
    assert [line.split()[0] for line in lines[header + 1 :][:5]] == PHASES
    assert any(line.startswith("step 1 ") for line in lines[header:])  # the only one: nothing is left to compare with a warm-up
    assert profile_of(trainer)["outside"]["first step, warm-up"] == 0


def failing_at(call: int, error: BaseException) -> Callable[..., list[float]]:
    calls = iter(range(1, 100))

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        if next(calls) == call:
            raise error
        return [sum(ids) / len(ids) / 100 for ids in completion_ids]

    return reward


def test_a_run_that_is_stopped_writes_the_profile_of_the_steps_it_made(tiny_trainer: Callable[..., Any]) -> None:
    trainer = tiny_trainer(max_steps=4, reward=failing_at(3, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(profile=True)
    assert profile_of(trainer)["steps"] == {"earlier": 0, "profiled": 2, "counted": [2, 2]}
    assert json.loads((Path(trainer.run_dir) / "run.json").read_text(encoding="utf-8"))["status"] == "stopped"


def test_a_run_that_fails_before_its_first_step_has_a_profile_without_steps(tiny_trainer: Callable[..., Any]) -> None:
    trainer = tiny_trainer(reward=failing_at(1, RuntimeError("the scorer went away")))
    with pytest.raises(ValueError, match="the scorer went away"):
        trainer.train(profile=True)
    profile = profile_of(trainer)
    assert profile["by_step"] == []
    assert profile_rows(profile) == []
    assert sum(profile["outside"].values()) == pytest.approx(profile["session_seconds"])


def test_a_resumed_run_profiles_its_own_session_and_says_so(tiny_trainer: Callable[..., Any], tmp_path: Path) -> None:
    folder = {"output_dir": str(tmp_path / "run"), "max_steps": 5, "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(**folder, reward=failing_at(3, KeyboardInterrupt())).train(profile=True)
    again = tiny_trainer(**folder, reward=failing_at(99, RuntimeError()))
    again.train(resume_from_checkpoint=True, profile=True)
    profile = profile_of(again)
    assert profile["steps"] == {"earlier": 2, "profiled": 3, "counted": [4, 5]}
    assert "The run's first 2 steps were made in an earlier session and are not in it." in profile_notes(profile)

    # another evaluation is all that is left to do
    finished = tiny_trainer(**folder, reward=failing_at(99, RuntimeError()), **{"evaluation.num_prompts": 1})
    finished.train(resume_from_checkpoint=True, profile=True)
    assert profile_of(finished)["steps"] == {"earlier": 5, "profiled": 0, "counted": []}
    assert "No step was run in this session, so there is nothing to compare with the floor." in profile_notes(profile_of(finished))


def test_without_a_penalty_there_is_no_reference_to_count(tiny_trainer: Callable[..., Any]) -> None:
    trainer = tiny_trainer(**{"kl.placement": "off"})
    trainer.train(profile=True)
    reference = profile_of(trainer)["phases"]["reference"]
    assert (reference["tokens"], reference["floor_seconds"], reference["ratio"]) == (0, 0, None)


# ---- what a judge reads

PROMPT = Prompt("p", "s", ({"role": "user", "content": "x"},), (2, 5, 6), "c", {"chosen": " four"})
GROUP = RolloutGroup(PROMPT, (Completion("ab", (120, 121), (0.0, 0.0), "length"),) * 3, 0)


def work_of(model: Any, judges: dict[str, bool], **settings: Any) -> tuple[PhaseWork, dict[str, Any]]:
    config = build_config({"reward": dict.fromkeys(judges, 1.0) or None, **settings})
    work = PhaseWork(model, SHAPE, config, judges)
    return work, work.of([GROUP], passes=1)


@pytest.fixture(scope="module")
def model(new_gemma: Callable[..., Any]) -> Any:
    return new_gemma()


def test_a_judge_reads_the_completions_with_its_question_and_the_datasets_reply_beside_them(model: Any) -> None:
    work, phases = work_of(model, {"generative": True})
    asked = 3 + 3 * (2 + work.suffix)
    reply = len("four") + 1 + work.suffix  # one token a byte, and the end of the turn
    assert phases["reward"][1] == asked + reply
    assert work_of(model, {"generative": True}, **{"reward_model.shaping": "none"})[1]["reward"][1] == asked
    assert work_of(model, {"generative": True, "judge": False})[1]["reward"][1] == 2 * (asked + reply)


def test_the_frozen_base_is_asked_once_for_verdicts_and_log_probabilities(model: Any) -> None:
    alone = work_of(model, {"judge": False}, **{"kl.placement": "off"})[1]
    shared = work_of(model, {"judge": False})[1]
    head = 2 * 6 * SHAPE.embedding_parameters
    assert shared["reward"][0][0].operations == alone["reward"][0][0].operations + head
    assert shared["reference"] == alone["reference"] == ([], 0)
    trained = work_of(model, {"generative": True})[1]
    assert len(trained["reference"][0]) == 1
    assert trained["reference"][1] == 3 + 6


def test_the_rewards_that_run_the_model_are_counted_in_a_run(tiny_trainer: Callable[..., Any]) -> None:
    trainer = tiny_trainer(reward={"judge": 1.0, "length": 0.5}, max_steps=1)
    trainer.train(profile=True)
    phases = profile_of(trainer)["phases"]
    assert phases["reward"]["ratio"] > 1
    assert phases["reference"]["ratio"] is None
