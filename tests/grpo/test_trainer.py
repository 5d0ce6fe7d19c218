"""The whole road on the small model: what a run writes, how long it is, which rewards it takes, and that its adapter is the policy."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from gemma_grpo import GRPOTrainer
from gemma_grpo.config import build_config, dump_recipe
from gemma_grpo.data.batch import pad_rollouts
from gemma_grpo.grpo.assess import EVALUATION_STEP
from gemma_grpo.grpo.step import role_logprobs, sampling_params

ROWS = Path(os.environ.get("HH_RLHF_DIR", "../shared/data/hh-rlhf"))
FLAT = {"advantage.no_signal_steps": 0}
"""Rewards may all be equal."""
PROMPT_ROWS = [{"prompt": f"question {index}?", "answer": f"answer {index}"} for index in range(16)]
METRIC = {"before", "after", "gain", "interval", "n"}


def pair_rows(count: int) -> list[dict[str, str]]:
    return [
        {"chosen": f"\n\nHuman: say {n}\n\nAssistant: {n}", "rejected": f"\n\nHuman: say {n}\n\nAssistant: no, no"} for n in range(count)
    ]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---- the quick start


@pytest.fixture(scope="module")
def quick_start(small_model_dir, tmp_path_factory):
    """The five arguments of the README, from a folder of its own because the run goes to ./runs."""
    folder, before = tmp_path_factory.mktemp("work"), Path.cwd()
    os.chdir(folder)
    try:
        trainer = GRPOTrainer(model_name=str(small_model_dir), dataset=pair_rows(24), learning_rate=1e-5, batch_size=2, epochs=2)
        evaluation = trainer.train()
    finally:
        os.chdir(before)
    return trainer, evaluation, folder / trainer.run_dir


def test_the_quick_start_trains_a_reward_then_the_policy_and_writes_the_run_directory(quick_start, small_model_dir):
    trainer, evaluation, run = quick_start
    assert run.parent.name == "runs"
    assert files(run) >= {
        *("recipe.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "events.jsonl", "evaluation.json"),
        *("reward/adapter_model.safetensors", "reward/adapter_config.json", "reward/calibration.json"),
        *("adapter/adapter_model.safetensors", "adapter/adapter_config.json"),
    }
    kinds = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert kinds.index("reward_training") < kinds.index("step_time") < kinds.index("checkpoint")
    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert info["status"] == "finished"
    assert info["data"]["prompts_train"] == 21
    assert info["steps"] == trainer.total_steps == 4  # 2 prompts x 8 accumulation = 16 of them a step, two steps an epoch
    assert json.loads((run / "evaluation.json").read_text(encoding="utf-8")) == evaluation
    assert json.loads((run / "adapter/adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"] == str(small_model_dir)


def test_the_quick_start_uses_the_trained_judge_and_the_small_rules(quick_start):
    _, _, run = quick_start
    first = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    for name in ("generative", "overlong", "repetition", "empty", "role_leak"):
        assert {f"rewards/{name}/mean", f"rewards/{name}/std"} <= set(first)
    calibration = json.loads((run / "reward" / "calibration.json").read_text(encoding="utf-8"))
    assert {"pairs_trained", "pairs_held_out", "accuracy", "accuracy_zero_shot", "longer_wins", "closest_length_quarter"} <= set(
        calibration
    )
    assert {"by_source", "calibration", "expected_calibration_error", "reference_mean", "reference_std"} <= set(calibration)
    witness = json.loads((run / "witness" / "calibration.json").read_text(encoding="utf-8"))
    assert calibration["pairs_trained"] + witness["pairs_trained"] + calibration["pairs_held_out"] == 24
    assert min(calibration["pairs_trained"], witness["pairs_trained"]) > 0


def test_a_step_is_logged_with_the_documented_names(quick_start):
    _, _, run = quick_start
    first = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    names = {"step", "reward", "reward_std", "frac_reward_zero_std", "kl", "kl_sequence", "kl_step", "entropy", "beta", "alpha", "loss"}
    names |= {"policy_loss", "grad_norm", "learning_rate", "clip_ratio/low_mean", "clip_ratio/high_mean", "num_tokens", "sampling_gap"}
    names |= {"completions/mean_length", "completions/max_length", "completions/clipped_ratio", "rollbacks", "passes"}
    names |= {"oom_retries", "token_budget"}
    assert names <= set(first)
    assert first["kl"] == pytest.approx(0.0, abs=1e-9)
    assert first["sampling_gap"] < 1e-4
    assert not any("time" in name or "second" in name for name in first)


def test_the_recipe_in_the_run_directory_holds_the_run_settings(quick_start):
    trainer, _, run = quick_start
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    assert text == dump_recipe(trainer.config)
    assert trainer.config.epochs == 2


# ---- rewards


def shortness(completions, **columns):
    return [-float(len(completion[0]["content"])) for completion in completions]


async def later(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


@pytest.mark.parametrize(
    ("reward", "names"),
    [
        (shortness, {"shortness"}),
        (later, {"later"}),
        ("length", {"length"}),
        ({"length": 0.5, "empty": 1.0}, {"length", "empty"}),
        ("judge", {"judge"}),
    ],
    ids=["function", "coroutine", "name", "mapping", "zero-shot judge"],
)
def test_a_reward_is_a_function_a_name_or_a_mix(train_tiny, reward, names):
    run = train_tiny(dataset=PROMPT_ROWS, reward=reward, max_steps=1, **FLAT)
    logged = {name.split("/")[1] for name in run.lines("metrics.jsonl")[0] if name.startswith("rewards/")}
    assert logged == names
    assert set(run.lines("samples.jsonl")[0]["completions"][0]["parts"]) == names
    assert not (run.path / "reward").exists()  # nothing was trained for it


def test_a_mix_is_the_weighted_sum_of_its_parts(train_tiny):
    run = train_tiny(reward={"length": 0.5, "empty": 2.0}, max_steps=1)
    for line in run.lines("samples.jsonl"):
        for completion in line["completions"]:
            parts = completion["parts"]
            assert completion["reward"] == pytest.approx(0.5 * parts["length"] + 2.0 * parts["empty"])
            assert parts["length"] == pytest.approx(-completion["length"] / 6)


def test_a_reward_function_gets_prompts_completions_and_the_rows_own_columns(train_tiny):
    seen = []

    def check(prompts, completions, completion_ids, answer, **columns):
        seen.extend(zip(prompts, completions, completion_ids, answer, strict=True))
        return [float(len(ids)) for ids in completion_ids]

    run = train_tiny(dataset=Dataset.from_list(PROMPT_ROWS), reward=check, max_steps=1, **FLAT)
    assert len(seen) == 6  # 2 prompts x 3 completions
    for prompt, completion, ids, answer in seen:
        assert prompt[-1]["content"].removeprefix("question ").removesuffix("?") == answer.removeprefix("answer ")
        assert completion[0]["role"] == "assistant"
        assert 1 <= len(ids) <= 6
    assert run.metrics("reward")[0] == pytest.approx(sum(len(ids) for _, _, ids, _ in seen) / 6)


def test_completions_nobody_scored_are_counted_and_teach_nothing(train_tiny):
    def half(completion_ids, **columns):
        return [float(len(ids)) if index % 3 else None for index, ids in enumerate(completion_ids)]

    run = train_tiny(reward=half, max_steps=1, **FLAT)
    assert run.metrics("unscored") == [2.0]
    for line in run.lines("samples.jsonl"):
        unscored, *scored = line["completions"]
        assert unscored["reward"] is None
        assert unscored["advantage"] == 0.0
        assert sum(completion["advantage"] for completion in scored) == pytest.approx(0.0, abs=1e-6)


def test_a_step_without_any_difference_in_reward_is_said(train_tiny):
    run = train_tiny(reward=lambda completions, **columns: [1.0] * len(completions), max_steps=1, **FLAT)
    assert run.metrics("frac_reward_zero_std") == [1.0]
    warnings = [line["text"] for line in run.lines("events.jsonl") if line["kind"] == "warn"]
    assert any("nothing was learned from rewards" in text for text in warnings)
    assert all(value.count_nonzero() == 0 for name, value in run.adapter().items() if "lora_B" in name)


# ---- how many steps, and of what


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"epochs": 1}, 3),  # 5 prompts, 2 a step
        ({"epochs": 2}, 6),
        ({"epochs": 0.5}, 2),  # rounded up
        ({"epochs": 1, "gradient_accumulation_steps": 2}, 2),
        ({"epochs": 3, "batch_size": 8}, 3),  # fewer prompts than a step takes: all of them each time
        ({"epochs": 2, "max_steps": 4}, 4),
        ({"epochs": 1, "max_steps": 100}, 3),
    ],
)
def test_steps_by_hand(tiny_trainer, settings, steps):
    assert tiny_trainer(**{"max_steps": None, "data.max_prompts": 5, **settings}).dry_run()["steps"] == steps


def test_every_epoch_sees_every_prompt_once_in_an_order_of_its_own(train_tiny):
    run = train_tiny(max_steps=None, epochs=2, **{"data.max_prompts": 5})
    lines = run.lines("samples.jsonl")
    per_step = [sum(line["step"] == step for line in lines) for step in range(1, 7)]
    assert per_step == [2, 2, 1, 2, 2, 1]  # the last batch of an epoch is short
    first, second = ([line["prompt_id"] for line in lines[start : start + 5]] for start in (0, 5))
    assert len(set(first)) == 5
    assert set(first) == set(second)
    assert first != second


def test_a_prompt_that_comes_again_is_answered_anew(train_tiny):
    # one prompt, equal rewards: the policy stays what it is, only the step's random numbers differ
    settings = {"max_steps": None, "epochs": 2, "data.max_prompts": 1, **FLAT}
    run = train_tiny(reward=lambda completions, **columns: [1.0] * len(completions), **settings)
    first, second = run.completions("text")
    assert first != second
    assert all(value.count_nonzero() == 0 for name, value in run.adapter().items() if "lora_B" in name)


def test_a_short_last_batch_is_averaged_over_its_own_completions(train_tiny):
    run = train_tiny(
        max_steps=None, epochs=1, planning_steps=1, **{"data.max_prompts": 3, "advantage.scale": "none", "kl.placement": "off"}
    )
    for step, prompts in ((1, 2), (2, 1)):
        completions = [c for line in run.lines("samples.jsonl") if line["step"] == step for c in line["completions"]]
        assert len(completions) == 3 * prompts
        # at ratio 1 the loss is -sum A T / (completions x limit)
        by_hand = -sum(c["advantage"] * c["length"] for c in completions) / (len(completions) * 6)
        assert run.metrics("loss")[step - 1] == pytest.approx(by_hand, abs=1e-6)


def test_what_was_read_kept_and_dropped_is_in_run_json(train_tiny):
    rows = [*PROMPT_ROWS, {"prompt": "x" * 200}, {"prompt": ""}, {"nothing": 1}]
    data = train_tiny(dataset=rows, max_steps=1, max_prompt_length=64).json("run.json")["data"]
    assert (data["rows"], data["kept"]) == (19, 17)
    assert data["dropped"] == {"empty_prompt": 1, "not_a_prompt": 1}
    assert data["prompts_dropped"] == {"prompt_too_long": 1}
    assert data["prompts"] == 16 == data["prompts_train"] + data["prompts_held_out"]


def test_a_run_over_its_kl_budget_stops_and_says_so(train_tiny):
    run = train_tiny(max_steps=5, learning_rate=0.1, **{"kl.ref_target": 1e-6, "kl.hard_stop_steps": 2, "kl.step_limit": None})
    assert len(run.lines("metrics.jsonl")) == 3  # the first step has no KL yet
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-00000003"]
    assert any("stopped at step 3" in line.get("text", "") for line in run.lines("events.jsonl") if line["kind"] == "warn")
    assert run.json("run.json")["status"] == "finished"


# ---- evaluation and the adapter


def test_evaluation_json_has_the_documented_shape(train_tiny):
    run = train_tiny(learning_rate=0.05, **{"evaluation.num_prompts": 4, "evaluation.num_completions": 2})
    assert run.json("evaluation.json") == run.evaluation
    for name in ("reward", "win_rate", "kl", "kl_sequence", "length"):
        metric = run.evaluation[name]
        assert set(metric) - {"judge", "length_controlled"} == METRIC
        assert metric["n"] == 8
        assert metric["gain"] == pytest.approx(metric["after"] - metric["before"])
    assert set(run.evaluation["refusal_harmful"]) == set(run.evaluation["refusal_benign"]) == METRIC
    assert (run.evaluation["refusal_harmful"]["n"], run.evaluation["refusal_benign"]["n"]) == (0, 8)
    assert run.evaluation["win_rate"]["judge"] == "reward"
    assert run.evaluation["win_rate"]["before"] == 0.5
    assert run.evaluation["kl"]["before"] == 0.0
    assert run.evaluation["kl_sequence"]["after"] != 0.0
    assert "gold" not in run.evaluation
    assert len(run.evaluation["samples"]) == 8
    trained = {line["prompt_id"] for line in run.lines("samples.jsonl")}
    assert trained.isdisjoint(sample["prompt_id"] for sample in run.evaluation["samples"])


def test_the_evaluation_is_of_reference_and_policy_and_their_distance(train_tiny):
    run = train_tiny(learning_rate=0.05, **{"evaluation.num_prompts": 4})
    trainer, evaluation = run.trainer, run.evaluation
    prompts = trainer.data.held_out_prompts[:4]
    sampled = {}
    for role, side in (("reference", "before"), ("policy", "after")):
        groups = trainer.engine.sample(prompts, sampling_params(trainer.config, EVALUATION_STEP, role=role, num_generations=1))
        texts = {group.prompt.prompt_id: group.completions[0].text for group in groups}
        assert texts == {sample["prompt_id"]: sample[side]["text"] for sample in evaluation["samples"]}
        assert evaluation["length"][side] == sum(len(group.completions[0].token_ids) for group in groups) / 4
        sampled[role] = groups
    batch = pad_rollouts(sampled["policy"])
    reference = role_logprobs(trainer.model, batch, "reference", temperature=1.0)
    total = sum(sum(group.completions[0].sampling_logprobs) for group in sampled["policy"]) - float(reference.sum())
    assert evaluation["kl_sequence"]["after"] == pytest.approx(total / 4, rel=1e-4)
    assert evaluation["kl"]["after"] == pytest.approx(total / int(batch.completion_mask.sum()), rel=1e-4)


def test_an_untrained_policy_evaluates_as_its_reference(train_tiny):
    # equal rewards: no gradient, so that policy and reference draw the same tokens from the same numbers
    settings = {"max_steps": 1, "evaluation.num_prompts": 4, **FLAT}
    run = train_tiny(reward=lambda completions, **columns: [1.0] * len(completions), **settings)
    for name in ("reward", "win_rate", "kl", "length"):
        assert run.evaluation[name]["gain"] == pytest.approx(0.0, abs=1e-9)
    assert all(sample["before"] == sample["after"] for sample in run.evaluation["samples"])


def test_without_held_out_prompts_there_is_no_evaluation(train_tiny):
    run = train_tiny(dataset=PROMPT_ROWS[:2], max_steps=1, **{"data.holdout": 1e-6, "evaluation.num_prompts": 4})
    assert run.evaluation == {}
    assert not (run.path / "evaluation.json").exists()


def test_a_reward_can_be_trained_without_held_out_pairs(train_tiny):
    run = train_tiny(dataset=pair_rows(3), reward=None, max_steps=1, **{"data.holdout": 1e-6})
    calibration = run.json("reward/calibration.json")
    assert calibration["pairs_held_out"] == 0
    assert calibration["accuracy"]["value"] is None
    assert math.isfinite(run.metrics("reward")[0])


def test_the_final_adapter_on_the_base_gives_the_trained_policys_log_probabilities(train_tiny, small_model_dir):
    run = train_tiny(learning_rate=0.05, max_steps=2)
    base = AutoModelForCausalLM.from_pretrained(small_model_dir, dtype=torch.float32)
    policy = PeftModel.from_pretrained(base, run.path / "adapter").eval()
    trainer = run.trainer
    groups = trainer.engine.sample(trainer.data.prompts[:4], sampling_params(trainer.config, 99))
    gaps, distances = [], []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([[*group.prompt.token_ids, *completion.token_ids]])
            targets = ids[0, len(group.prompt.token_ids) :, None]
            with torch.no_grad():
                trained = policy(input_ids=ids).logits[0, -len(targets) - 1 : -1].log_softmax(-1).gather(-1, targets)[:, 0]
                with policy.disable_adapter():
                    plain = policy(input_ids=ids).logits[0, -len(targets) - 1 : -1].log_softmax(-1).gather(-1, targets)[:, 0]
            sampled = torch.tensor(completion.sampling_logprobs)
            gaps.append(float((trained - sampled).abs().max()))
            distances.append(float((plain - sampled).abs().max()))
    assert max(gaps) < 1e-5
    assert max(distances) > 0.1  # and the training went somewhere


# ---- the ways in


def test_from_recipe_is_the_same_run(tiny_trainer, small_model_dir, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, PROMPT_ROWS)), encoding="utf-8")
    settings = {"model_name": str(small_model_dir), "dataset": str(rows), "reward": {"length": 1.0}, "num_generations": 3, "batch_size": 2}
    settings |= {"gradient_accumulation_steps": 1, "max_steps": 1, "max_completion_length": 6, "evaluation.num_prompts": 2, **FLAT}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(build_config(settings)), encoding="utf-8")
    first = GRPOTrainer.from_recipe(recipe, {"output_dir": str(tmp_path / "first")})
    second = GRPOTrainer(**settings, output_dir=str(tmp_path / "second"))
    evaluations = [{**trainer.train(), "seconds": 0} for trainer in (first, second)]
    assert evaluations[0] == evaluations[1]
    assert (tmp_path / "first/metrics.jsonl").read_bytes() == (tmp_path / "second/metrics.jsonl").read_bytes()

    again = GRPOTrainer.from_run(tmp_path / "first")
    assert {**again.evaluate(), "seconds": 0} == evaluations[0]


def test_a_trained_reward_adapter_is_used_again_without_training(train_tiny):
    first = train_tiny(reward={"generative": 1.0}, max_steps=1)
    second = train_tiny(reward={"generative": 1.0}, max_steps=1, **{"reward_model.path": str(first.path / "reward")})
    assert second.text("metrics.jsonl") == first.text("metrics.jsonl")
    assert not any(line["kind"] == "reward_training" for line in second.lines("events.jsonl"))


def test_only_the_reward_can_be_trained(tiny_trainer):
    trainer = tiny_trainer(reward=None)
    calibration = trainer.train_reward()
    assert json.loads((trainer.run_dir / "reward/calibration.json").read_text(encoding="utf-8")) == calibration
    assert not (trainer.run_dir / "adapter").exists()
    assert (trainer.run_dir / "metrics.jsonl").read_text(encoding="utf-8") == ""


def test_the_reward_trained_first_is_the_one_training_uses(tiny_trainer, train_tiny):
    trainer = tiny_trainer(reward={"generative": 1.0})
    trainer.train_reward()
    trainer.train()
    assert (trainer.run_dir / "metrics.jsonl").read_text(encoding="utf-8") == train_tiny(reward={"generative": 1.0}).text("metrics.jsonl")


def test_a_dry_run_loads_everything_and_writes_nothing(tiny_trainer, tmp_path):
    plan = tiny_trainer(output_dir=str(tmp_path / "run"), reward={"length": 2.0}).dry_run()
    assert plan["rewards"] == {"length": 2.0}
    assert plan["counts"]["rows"] == 24
    assert len(plan["prompts"]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not ROWS.is_dir(), reason="the hh-rlhf rows are not on this machine (HH_RLHF_DIR)")
def test_real_rows_train(train_tiny):
    path = ROWS / "harmless-base.dev.jsonl.gz"
    settings = {"reward_model.max_pairs": 8, "data.max_prompts": 4, "data.holdout": 0.005, "evaluation.num_prompts": 4}
    run = train_tiny(dataset=str(path), reward=None, max_prompt_length=128, **settings)
    assert run.json("run.json")["data"]["rows"] == 1700
    assert len(run.lines("metrics.jsonl")) == 2
    assert {line["source"] for line in run.lines("samples.jsonl")} == {"harmless-base"}
    assert run.json("reward/calibration.json")["pairs_trained"] == 8
    assert run.evaluation["refusal_harmful"]["n"] == 4
