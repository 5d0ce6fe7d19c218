"""Looks at a policy in training: what they see, that they change nothing, and what becomes of an alarm."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import mean_letter
from safetensors.torch import load_file

LOOKING = {"witness.every": 2, "witness.num_prompts": 3, "max_steps": 5, "save_steps": 0}
TRAINED = {"reward": {"generative": 1.0}, "witness.share": 0.5, "reward_model.max_pairs": 12}


def steps(run: Any) -> list[int]:
    return [look["step"] for look in run.lines("witnesses.jsonl")]


def test_looks_are_taken_at_the_start_every_so_often_and_at_the_end(train_tiny) -> None:
    assert steps(train_tiny(**LOOKING)) == [0, 2, 4, 5]
    assert steps(train_tiny(**{**LOOKING, "witness.every": 0})) == []


def test_looking_changes_nothing_about_the_training(train_tiny) -> None:
    looked, blind = train_tiny(**LOOKING), train_tiny(**{**LOOKING, "witness.every": 0})
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert looked.text(name) == blind.text(name)
    assert {k: v.tolist() for k, v in looked.adapter().items()} == {k: v.tolist() for k, v in blind.adapter().items()}


def test_every_look_answers_the_same_held_out_prompts_and_says_what_is_known(train_tiny) -> None:
    run = train_tiny(**LOOKING, **TRAINED)
    looks = run.lines("witnesses.jsonl")
    asked = [[reply["prompt_id"] for reply in look["replies"]] for look in looks]
    assert all(one == asked[0] for one in asked)
    assert len(set(asked[0])) == 3
    assert set(asked[0]).isdisjoint(line["prompt_id"] for line in run.lines("samples.jsonl"))
    first, later = looks[0]["replies"][0], looks[1]["replies"][0]
    assert first["prompt"][-1]["role"] == "user"
    assert "prompt" not in later
    assert {"text", "length", "clipped", "refused", "proxy", "witness", "lexical", "kl", "fluency"} <= set(later)
    assert "gold" not in later
    # before the first update the policy is the reference: the same tokens, the same log-probabilities
    assert looks[0]["metrics"]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert looks[-1]["metrics"]["kl"] != 0.0


def test_numbers_of_a_look_are_the_means_of_its_replies(train_tiny) -> None:
    looks = train_tiny(**LOOKING, **TRAINED, learning_rate=0.1, **{"kl.step_limit": None}).lines("witnesses.jsonl")
    assert len({look["metrics"]["strayed"] for look in looks}) > 1
    for look in looks:
        replies, metrics = look["replies"], look["metrics"]
        for name in ("proxy", "witness", "length", "fluency"):
            assert metrics[name] == pytest.approx(sum(reply[name] for reply in replies) / 3)
        for reply in replies:
            assert reply["strayed"] == (reply["kl"] / reply["length"] > 0.4)
        assert metrics["strayed"] == pytest.approx(sum(reply["strayed"] for reply in replies) / 3)
        assert metrics["kl"] == pytest.approx(sum(reply["kl"] for reply in replies) / sum(reply["length"] for reply in replies))


def test_the_adapter_the_witness_liked_best_lies_beside_the_last(train_tiny) -> None:
    run = train_tiny(**LOOKING, **TRAINED, learning_rate=0.05)
    best, looks = run.json("best/best.json"), run.lines("witnesses.jsonl")
    highest = max(looks, key=lambda look: look["metrics"]["witness"])
    assert (best["step"], best["witness"]) == (highest["step"], highest["metrics"]["witness"])
    assert set(load_file(run.path / "best" / "adapter_model.safetensors")) == set(run.adapter())


def test_a_stopped_run_takes_each_look_once(train_tiny, tmp_path) -> None:
    # a constant rate: with another number of steps a falling one would be another run
    settings = {**LOOKING, **TRAINED, "optimizer.schedule": "constant"}
    whole, folder = train_tiny(**settings), {"output_dir": str(tmp_path / "run")}
    train_tiny(**{**settings, "max_steps": 4}, **folder)
    resumed = train_tiny(**settings, **folder, resume=True)
    assert resumed.text("witnesses.jsonl") == whole.text("witnesses.jsonl")
    assert resumed.text("best/best.json") == whole.text("best/best.json")


def shouting(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that is easily gamed: the more exclamation marks and other odd characters, the better."""
    return [sum(not character.isalnum() for character in reply[0]["content"]) / 5 for reply in completions]


HACKED = {
    **{"reward": shouting, "learning_rate": 0.3, "kl.placement": "off", "kl.step_limit": None, "max_steps": 12, "num_generations": 8},
    **{"batch_size": 4, "witness.every": 2, "witness.num_prompts": 6, "witness.num_completions": 8, "max_completion_length": 12},
    **{"optimizer.spike_sigma": None, "epochs": 9.0, "data.holdout": 0.4},
}


def test_a_hacked_reward_raises_an_alarm_and_stops_the_run_where_asked(train_tiny) -> None:
    run = train_tiny(**HACKED)
    alarms = [event for event in run.lines("events.jsonl") if event["kind"] == "alarm"]
    assert {alarm["witness"] for alarm in alarms} >= {"fluency"}
    assert alarms[-1]["level"] == "alert"
    told = [alarm for look in run.lines("witnesses.jsonl") for alarm in look["alarms"]]
    assert [alarm["text"] for alarm in told] == [alarm["text"] for alarm in alarms]
    prompts = {reply["prompt_id"] for reply in run.lines("witnesses.jsonl")[0]["replies"]}
    assert all(set(alarm["samples"]) <= prompts for alarm in alarms)
    stopped = train_tiny(**HACKED, **{"witness.stop_on_alert": True})
    first = next(alarm["step"] for alarm in alarms if alarm["level"] == "alert")
    assert steps(stopped)[-1] == len(stopped.lines("metrics.jsonl")) == first < 12
    assert json.loads((stopped.path / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    # killed before it could say that it was over: what goes on with it must not train on
    (stopped.path / "run.json").write_text((stopped.path / "run.json").read_text(encoding="utf-8").replace("finished", "running"))
    metrics = stopped.text("metrics.jsonl")
    again = train_tiny(**HACKED, **{"witness.stop_on_alert": True}, output_dir=str(stopped.path), resume=True)
    assert again.text("metrics.jsonl") == metrics


def test_a_run_without_held_out_prompts_takes_no_looks(train_tiny) -> None:
    run = train_tiny(reward=mean_letter, **LOOKING, **{"data.holdout": 1e-6})
    assert run.lines("witnesses.jsonl") == []


def test_more_judges_than_the_pairs_can_teach_are_refused(tiny_trainer) -> None:
    settings = {"reward": {"generative": 1.0}, "reward_model.max_pairs": 1, "reward_model.members": 2}
    with pytest.raises(ValueError, match=r"no pair is left to train 'reward(-2)?' on: 1 pairs are too few for reward_model.members=2"):
        tiny_trainer(**settings).train()
