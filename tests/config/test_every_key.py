"""Every setting does something: each one is changed alone, in a training of a few steps, and what it is for must change with it.

A key that nothing reads is a defect. The table must name every field of GRPOConfig, so a new setting cannot come without its row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from gemma_grpo.config import GRPOConfig
from gemma_grpo.data.chat import judge_suffix_ids
from gemma_grpo.data.sources import DataError
from gemma_grpo.reward.base import RewardError
from gemma_grpo.reward.generative import JUDGE_QUESTION

Observe = Callable[[Any], Any]


def metric(name: str) -> Observe:
    return lambda run: run.metrics(name)


def completion(name: str) -> Observe:
    return lambda run: run.completions(name)


def data_count(name: str) -> Observe:
    return lambda run: run.json("run.json")["data"][name]


def evaluated(name: str) -> Observe:
    return lambda run: run.json("evaluation.json")[name]["n"]


def num_steps(run: Any) -> int:
    return len(run.lines("metrics.jsonl"))


def groups_per_step(run: Any) -> list[int]:
    steps = [line["step"] for line in run.lines("samples.jsonl")]
    return [steps.count(step) for step in sorted(set(steps))]


def weights(run: Any, folder: str = "adapter") -> dict[str, list[float]]:
    return {name: value.flatten().tolist() for name, value in run.adapter(folder).items()}


reward_weights = partial(weights, folder="reward")


def shapes(run: Any) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in run.adapter().items()}


def sources(run: Any) -> set[str]:
    return {line["source"] for line in run.lines("samples.jsonl")}


def prompts(run: Any) -> list[Any]:
    return [line["prompt"] for line in run.lines("samples.jsonl")]


def reward_was_trained(run: Any) -> bool:
    return any(line["kind"] == "reward_training" for line in run.lines("events.jsonl"))


def calibration(name: str) -> Observe:
    return lambda run: run.json("reward/calibration.json")[name]


@dataclass(frozen=True)
class Change:
    """One setting, another value for it, and what must then be different."""

    value: Any
    observe: Observe | None
    """None: a test of its own."""
    context: Mapping[str, Any] = field(default_factory=dict)
    """What the setting needs to matter; the run it is compared with has it too."""


GENERATIVE = {"reward": {"generative": 1.0}}
SEVERAL = {"reward": {"length": 1.0, "empty": 0.3}}
FAR = {"learning_rate": 0.3, "kl.step_limit": None}
"""Updates that leave the trust region."""
AWAKE = {"entropy.threshold": 2.0}
"""Any entropy is below twice the first one."""
WATCHED = {"witness.every": 2}
TWO_JUDGES = {**GENERATIVE, "reward_model.members": 2}


def looks(run: Any) -> list[Any]:
    return run.lines("witnesses.jsonl")


EVALUATED = {"evaluation.num_prompts": 2}

CHANGES: dict[str, Change] = {
    "model_name": Change("{another_model}", shapes),
    "dataset": Change("{another_dataset}", prompts),
    "reward": Change({"length": -1.0}, completion("reward"), {"reward": {"length": 1.0}}),
    "output_dir": Change("{another_folder}", lambda run: run.path.name),
    "seed": Change(1, completion("text")),
    "learning_rate": Change(2e-2, metric("learning_rate")),
    "batch_size": Change(3, groups_per_step),
    "gradient_accumulation_steps": Change(2, groups_per_step),
    "epochs": Change(2.0, num_steps, {"max_steps": None, "data.max_prompts": 3}),
    "max_steps": Change(1, num_steps),
    "max_minutes": Change(1e-6, None),
    "num_generations": Change(2, lambda run: [len(group) for group in run.completions("text")]),
    "planning_steps": Change(1, metric("passes")),
    "max_prompt_length": Change(40, data_count("prompts_shortened")),
    "max_completion_length": Change(4, metric("completions/max_length")),
    "temperature": Change(0.5, completion("text")),
    "save_steps": Change(1, lambda run: sorted(path.name for path in (run.path / "checkpoints").iterdir())),
    "keep_checkpoints": Change(2, lambda run: len(list((run.path / "checkpoints").iterdir())), {"save_steps": 1, "max_steps": 3}),
    "precision": Change("bf16", lambda run: run.trainer.model.causal_lm.dtype, {"precision": "fp32"}),
    "quantization": Change("nf4", metric("entropy")),
    "gradient_checkpointing": Change(True, None, {"gradient_checkpointing": False}),
    "lora.r": Change(4, shapes),
    "lora.alpha": Change(64, weights),
    "lora.dropout": Change(0.3, weights),
    "lora.target_modules": Change(("o_proj", "gate_proj"), shapes),
    "sampling.top_k": Change(3, completion("text")),
    "sampling.top_p": Change(0.3, completion("text")),
    "advantage.baseline": Change("mean", completion("advantage")),
    "advantage.scale": Change("none", completion("advantage")),
    "advantage.clip": Change(0.5, completion("advantage")),
    "advantage.aggregation": Change("gdpo", completion("advantage"), SEVERAL),
    "advantage.no_signal_steps": Change(2, None),
    "loss.type": Change("cispo", weights, FAR),
    "loss.aggregation": Change("grpo", metric("loss")),
    "loss.clip_low": Change(0.9, metric("clip_ratio/low_mean"), FAR),
    "loss.clip_high": Change(9.0, metric("clip_ratio/high_mean"), FAR),
    "loss.dual_clip": Change(1.01, weights, FAR),
    "loss.tis_cap": Change(0.5, weights, {"sampling.top_k": 3}),
    "loss.tis_mask": Change(1.1, metric("tis/masked"), {"sampling.top_k": 3, "loss.tis_cap": 2.0}),
    "kl.placement": Change("off", lambda run: ["kl" in line for line in run.lines("metrics.jsonl")]),
    "kl.estimator": Change("k3", weights),
    "kl.beta": Change(0.2, metric("beta")),
    "kl.beta_min": Change(0.05, metric("beta"), {"kl.ref_target": 100.0}),
    "kl.beta_max": Change(0.05, metric("beta"), {"max_steps": 4, "kl.ref_target": 1e-6}),
    "kl.ref_target": Change(None, metric("beta")),
    "kl.step_limit": Change(1e-6, metric("rollbacks")),
    "kl.hard_stop_steps": Change(1, num_steps, {"max_steps": 3, "kl.ref_target": 1e-6}),
    "entropy.threshold": Change(2.0, metric("alpha")),
    "entropy.max_alpha_ratio": Change(0.2, metric("alpha"), AWAKE),
    "entropy.step": Change(0.2, metric("alpha"), AWAKE),
    "optimizer.beta1": Change(0.5, weights),
    "optimizer.beta2": Change(0.5, weights),
    "optimizer.eps": Change(1e-2, weights),
    "optimizer.weight_decay": Change(0.5, weights),
    "optimizer.max_grad_norm": Change(1e-3, weights),
    "optimizer.warmup_updates": Change(8, metric("learning_rate")),
    "optimizer.schedule": Change("constant", metric("learning_rate")),
    "optimizer.spike_sigma": Change(1e-9, metric("skipped_updates"), {"max_steps": 24, "epochs": 9.0}),
    "optimizer.on_spike": Change("stop", None),
    "reward_model.path": Change("{trained_reward}", reward_was_trained, GENERATIVE),
    "reward_model.learning_rate": Change(1e-2, reward_weights, GENERATIVE),
    "reward_model.batch_size": Change(4, reward_weights, GENERATIVE),
    "reward_model.max_pairs": Change(5, calibration("pairs_trained"), GENERATIVE),
    "reward_model.max_length": Change("{one_turn_and_the_question}", data_count("pairs_shortened"), GENERATIVE),
    "reward_model.centering": Change(1.0, reward_weights, GENERATIVE),
    "reward_model.label_smoothing": Change(0.3, reward_weights, GENERATIVE),
    "reward_model.shaping": Change("none", completion("reward"), GENERATIVE),
    "reward_model.par_reference": Change("samples", completion("reward"), GENERATIVE),
    "reward_model.members": Change(2, calibration("members"), GENERATIVE),
    "reward_model.combine": Change("worst", completion("reward"), TWO_JUDGES),
    "reward_model.uncertainty": Change(5.0, completion("reward"), TWO_JUDGES),
    "reward_model.per_source": Change(True, calibration("members"), {**GENERATIVE, "data.source": "somewhere"}),
    "reward_model.implicit_member": Change(True, calibration("members"), GENERATIVE),
    "reward_model.dpo_beta": Change(5.0, calibration("members"), {**GENERATIVE, "reward_model.implicit_member": True}),
    "reward_model.length_residual": Change(True, calibration("length_slopes"), GENERATIVE),
    "judge.rubric": Change("A good reply is short.", completion("parts"), {"reward": {"judge": 1.0}}),
    "judge.opponents": Change(1, completion("parts"), {"reward": {"pairwise": 1.0}, "num_generations": 4}),
    "judge.least_accuracy": Change(0.99, completion("reward"), {"reward": {"judge": 1.0, "length": 0.1}, "judge.least_accuracy": 0.0}),
    "witness.share": Change(0.2, data_count("pairs_witness"), {**GENERATIVE, "witness.share": 0.0}),
    "witness.path": Change("{trained_reward}", lambda run: "witness" in looks(run)[0]["metrics"], {**GENERATIVE, **WATCHED}),
    "witness.every": Change(1, lambda run: [look["step"] for look in looks(run)], {"witness.every": 0}),
    "witness.num_prompts": Change(2, lambda run: len(looks(run)[0]["replies"]), WATCHED),
    "witness.num_completions": Change(2, lambda run: len(looks(run)[0]["replies"]), WATCHED),
    "witness.look_alikes": Change(3, lambda run: len(looks(run)[0]["replies"]), WATCHED),
    "witness.stop_on_alert": Change(True, None),
    "reward_function.timeout": Change(60.0, None),
    "reward_function.on_failure": Change("skip", None),
    "reward_function.max_skipped": Change(0.1, None),
    "memory.limit_gib": Change(1.5, lambda run: run.json("run.json")["plan"]["limit_bytes"]),
    "memory.token_budget": Change(1, None),
    "memory.kv_token_budget": Change(40, None),
    "gpus": Change(2, None),  # these four: tests/test_launcher.py, tests/test_distributed.py
    "sharding": Change("none", None),  # tests/grpo/test_sharded_ranks.py, tests/test_planner_sharding.py
    "ranks.timeout_seconds": Change(3.0, None),
    "ranks.grace_seconds": Change(5.0, None),
    "ranks.max_restarts": Change(1, None),
    "serving.urls": Change(("http://127.0.0.1:1",), None),  # these five: tests/rollout/test_vllm.py, tests/grpo/test_served_runs.py
    "serving.adapters": Change("shared", None),
    "serving.max_staleness": Change(1, None),
    "serving.timeout_seconds": Change(1.0, None),
    "serving.tolerance": Change(0.5, None),
    "sandbox.seconds": Change(1.0, None),  # these two: tests/reward/sandbox/test_unit_tests.py
    "sandbox.memory_mib": Change(256, None),
    "watchdog.factor": Change(2.0, None),
    "watchdog.floor_seconds": Change(1.0, None),
    "data.source": Change("elsewhere", sources),
    "data.max_prompts": Change(3, data_count("prompts_train")),
    "data.holdout": Change(0.6, data_count("prompts_held_out")),
    "data.strict": Change(True, None),
    "evaluation.num_prompts": Change(3, evaluated("reward"), EVALUATED),
    "evaluation.primary": Change("win_rate", lambda run: run.evaluation["primary"], EVALUATED),
    "evaluation.num_completions": Change(2, evaluated("reward"), EVALUATED),
}


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from leaves(info.annotation, f"{name}.")
        else:
            yield prefix + name


@pytest.fixture(scope="module")
def baseline(train_tiny: Callable[..., Any]) -> Callable[[Mapping[str, Any]], Any]:
    """The run to compare with, one for each context."""
    runs: dict[str, Any] = {}

    def run(context: Mapping[str, Any]) -> Any:
        key = json.dumps(context, sort_keys=True)
        if key not in runs:
            runs[key] = train_tiny(**context)
        return runs[key]

    return run


@pytest.fixture
def filled_in(tiny_model_dir: Path, tokenizer: Any, tmp_path: Path, baseline: Callable[..., Any]) -> Callable[[Any], Any]:
    """Values that stand for something on disk, or depend on it."""

    def value(given: Any) -> Any:
        if given == "{another_model}":
            return str(tiny_model_dir)
        if given == "{another_folder}":
            return str(tmp_path / "elsewhere")
        if given == "{trained_reward}":
            return str(baseline(GENERATIVE).path / "reward")
        if given == "{one_turn_and_the_question}":
            return len(judge_suffix_ids(tokenizer, JUDGE_QUESTION)) + 75  # a row of two turns has about 110 tokens
        if given == "{another_dataset}":
            rows = [{"prompt": f"another question {index}"} for index in range(8)]
            path = tmp_path / "another.jsonl"
            path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
            return str(path)
        return given

    return value


def test_the_table_names_every_setting() -> None:
    assert sorted(CHANGES) == sorted(leaves(GRPOConfig))


def test_the_table_changes_what_it_says() -> None:
    for key, change in CHANGES.items():
        stage, _, name = key.rpartition(".")
        default = getattr(getattr(GRPOConfig(), stage) if stage else GRPOConfig(), name)
        assert change.context.get(key, default) != change.value, key


def test_without_a_change_nothing_changes(baseline, train_tiny) -> None:
    # or every other test here would pass by noise
    first, again = baseline(GENERATIVE), train_tiny(**GENERATIVE)
    for name in ("metrics.jsonl", "samples.jsonl", "reward/calibration.json"):
        assert again.text(name) == first.text(name)
    assert weights(again) == weights(first)
    assert reward_weights(again) == reward_weights(first)


@pytest.mark.parametrize("key", [key for key, change in CHANGES.items() if change.observe is not None])
def test_a_setting_changes_what_it_is_for(key, baseline, train_tiny, filled_in) -> None:
    change = CHANGES[key]
    changed = train_tiny(**{**change.context, key: filled_in(change.value)})
    assert change.observe(changed) != change.observe(baseline(change.context))


def test_a_deadline_calls_the_reward_in_another_process(train_tiny, tmp_path) -> None:
    def noting(completions: list[Any], **columns: Any) -> list[float]:
        with open(tmp_path / "pids", "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} ")
        return [float(len(completion[0]["content"])) for completion in completions]

    def processes(**settings: Any) -> set[int]:
        train_tiny(reward=noting, **settings)
        pids = {int(pid) for pid in (tmp_path / "pids").read_text(encoding="utf-8").split()}
        (tmp_path / "pids").unlink()
        return pids

    assert processes() == {os.getpid()}
    others = processes(**{"reward_function.timeout": 60.0})
    assert len(others) == 2  # one a step
    assert os.getpid() not in others


def test_a_failure_is_skipped_where_it_may_be_and_only_so_many(train_tiny) -> None:
    def failing(completions: list[Any], **columns: Any) -> list[Any]:
        return [None, "good", 0.1, *[0.5] * (len(completions) - 4), 0.2]  # one of six; None is an answer

    with pytest.raises(RewardError, match="returned 'good'"):
        train_tiny(reward=failing)
    skip = {"reward_function.on_failure": "skip"}
    assert train_tiny(reward=failing, **skip).metrics("rewards/failing/skipped") == [1.0, 1.0]
    with pytest.raises(RewardError, match=r"more than reward_function\.max_skipped \(0\.1\) allows"):
        train_tiny(reward=failing, **skip, **{"reward_function.max_skipped": 0.1})


def model_passes(train: Callable[[], Any], *, learning: bool) -> tuple[Any, int]:
    """A run, and how many times the whole model was computed in it, with gradients or without."""
    passes = 0

    def count(module: torch.nn.Module, inputs: Any) -> None:
        nonlocal passes
        passes += type(module).__name__ == "Gemma3TextModel" and torch.is_grad_enabled() is learning

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        return train(), passes
    finally:
        hook.remove()


def test_the_token_budget_cuts_passes_and_changes_no_completion(train_tiny) -> None:
    settings = {"max_steps": 1, "planning_steps": 1, "kl.step_limit": None}
    whole, passes = model_passes(lambda: train_tiny(**settings), learning=True)
    assert passes == 1  # two prompts of three completions, all at once
    cut, passes = model_passes(lambda: train_tiny(**settings, **{"memory.token_budget": 1}), learning=True)
    assert passes == 6  # one at a time
    both = [[line for run_line in run.lines("samples.jsonl") for line in run_line["completions"]] for run in (cut, whole)]
    for one, other in zip(*both, strict=True):  # log-ratios are of sums in another order
        assert one.pop("log_ratios", []) == pytest.approx(other.pop("log_ratios", []), abs=2e-3)
        assert one == other
    assert cut.metrics("grad_norm") == pytest.approx(whole.metrics("grad_norm"), rel=1e-4)
    assert cut.metrics("token_budget") == [1.0]


def test_the_budget_of_keys_and_values_parts_the_rollout_and_changes_no_completion(train_tiny) -> None:
    settings = {"max_steps": 1, "kl.placement": "off", "kl.step_limit": None}
    whole, passes = model_passes(lambda: train_tiny(**settings), learning=False)
    cut, more = model_passes(lambda: train_tiny(**settings, **{"memory.kv_token_budget": 40}), learning=False)
    assert cut.text("samples.jsonl") == whole.text("samples.jsonl")
    assert (passes, more) == (1, 2)  # both prompts computed together; one after the other


def test_strict_data_stop_at_the_row_that_would_be_dropped(train_tiny) -> None:
    rows = [*({"prompt": f"question {index}"} for index in range(6)), {"text": "no prompt"}]
    lenient = train_tiny(dataset=rows, max_steps=1).json("run.json")["data"]
    assert (lenient["kept"], lenient["dropped"], lenient["examples"]) == (6, {"not_a_prompt": 1}, ["the given rows, row 7: not_a_prompt"])
    with pytest.raises(DataError, match=r"^the given rows, row 7: not_a_prompt \(it has no prompt or messages\)\. Mend this row"):
        train_tiny(dataset=rows, **{"data.strict": True})


def test_gradient_checkpointing_computes_each_layer_once_more(train_tiny) -> None:
    def layers_computed(checkpointing: bool) -> int:
        computed = 0

        def count(module: torch.nn.Module, inputs: Any) -> None:
            nonlocal computed
            computed += type(module).__name__ == "Gemma3Attention" and torch.is_grad_enabled()

        # inside a layer, whose own hooks the second computation leaves out; and before it runs, as that is broken off when it suffices
        hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
        try:
            run = train_tiny(max_steps=1, gradient_checkpointing=checkpointing, **{"kl.step_limit": None})
        finally:
            hook.remove()
        assert run.metrics("passes") == [2.0]
        return computed

    # 2 layers, 2 passes over one micro-batch; and again in each backward pass
    assert layers_computed(False) == 4
    assert layers_computed(True) == 8
