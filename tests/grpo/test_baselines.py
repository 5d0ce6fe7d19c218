"""The plain ways beside a tuned policy: measured alike, and best-of-n by its own definition."""

from __future__ import annotations

from typing import Any

import pytest
from safetensors.torch import load_file

from gemma_grpo.evaluation import best_of_n_kl
from gemma_grpo.grpo.assess import EVALUATION_STEP, sample_in_chunks
from gemma_grpo.grpo.baselines import BEST_OF
from gemma_grpo.grpo.step import sampling_params

SETTINGS = {"reward": {"generative": 1.0}, "evaluation.num_prompts": 4, "evaluation.num_completions": 2, "reward_model.learning_rate": 5e-3}


@pytest.fixture(scope="module")
def compared(train_tiny) -> tuple[Any, dict[str, Any]]:
    run = train_tiny(**SETTINGS)
    return run, run.trainer.evaluate(baselines=True)


def test_every_baseline_has_the_same_numbers_of_the_same_replies_before(compared) -> None:
    run, found = compared
    assert list(found["baselines"]) == [*(f"best of {n}" for n in BEST_OF), "DPO", "SFT"]
    for summary in found["baselines"].values():
        for name in ("reward", "length", "kl_sequence", "win_rate"):
            assert summary[name]["before"] == found[name]["before"]
            assert summary[name]["n"] == 8
            assert len(summary[name]["interval"]) == 2
    assert run.json("evaluation.json")["baselines"] == found["baselines"]
    for name in ("dpo", "sft"):
        assert set(load_file(run.path / "baselines" / name / "adapter_model.safetensors")) == set(run.adapter())


def test_best_of_n_is_the_best_of_so_many_of_the_untouched_models_replies(compared) -> None:
    run, found = compared
    trainer, n = run.trainer, BEST_OF[0]
    params = sampling_params(trainer.config, EVALUATION_STEP, role="reference", num_generations=2 * n)
    groups = sample_in_chunks(trainer.engine, trainer.data.held_out_prompts[:4], params, 100)
    rewards = trainer.rewards.score(groups).rewards
    best = [max(row[k * n : (k + 1) * n]) for row in rewards for k in range(2)]
    summary = found["baselines"][f"best of {n}"]
    assert summary["reward"]["after"] == pytest.approx(sum(best) / 8, abs=1e-6)
    assert summary["kl_sequence"]["after"] == pytest.approx(best_of_n_kl(n))
    more = found["baselines"][f"best of {BEST_OF[1]}"]
    assert more["reward"]["after"] >= summary["reward"]["after"] >= summary["reward"]["before"]


def test_an_evaluation_without_them_keeps_what_was_measured_of_the_same_policy(compared) -> None:
    run, found = compared
    again = run.trainer.evaluate()
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in found.items() if k != "seconds"}
    for parameter in run.trainer.model.adapter_parameters("policy").values():
        parameter.data += 0.05
    assert "baselines" not in run.trainer.evaluate()  # another policy


def test_another_beta_is_another_policy(train_tiny, compared) -> None:
    run, _ = compared
    other = train_tiny(**SETTINGS, **{"reward_model.dpo_beta": 5.0})
    other.trainer.evaluate(baselines=True)
    one, two = (load_file(path / "baselines" / "dpo" / "adapter_model.safetensors") for path in (run.path, other.path))
    assert any((one[name] != two[name]).any() for name in one)
