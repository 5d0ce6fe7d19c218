"""Counters that grow large keep their order, their names and their values: steps beyond eight digits, epochs by the million."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gemma_grpo.checkpoint import latest_checkpoint, read_checkpoint, save_checkpoint
from gemma_grpo.data.prompts import order
from gemma_grpo.grpo.control import Signal, SpikeGuard, StepLimit
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.rollout.sampling import row_keys, uniforms
from gemma_grpo.types import Prompt, StepRecord


def save(folder: Path, step: int) -> Path:
    adapters = {"policy": {"adapter_model.safetensors": b"x"}}
    return save_checkpoint(folder, step, adapters=adapters, optimizer={}, state={"num_tokens": step * 10**6}, keep=3)


def test_steps_of_more_digits_than_names_are_padded_to_stay_in_order(tmp_path: Path) -> None:
    steps = (99_999_998, 99_999_999, 100_000_000, 100_000_001, 2**31, 2**40)
    for step in steps:
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-100000001", "step-1099511627776", "step-2147483648"]
    found, damaged = latest_checkpoint(tmp_path)
    assert damaged == []
    assert found is not None
    assert (found.step, found.state["num_tokens"]) == (2**40, 2**40 * 10**6)  # beyond what a float holds exactly
    assert read_checkpoint(tmp_path / "step-2147483648").step == 2**31


def test_the_log_holds_large_counts_exactly(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", "model_name: miniature\n", {}) as run:
        run.append_metrics(StepRecord(100_000_001, {}, {"num_tokens": float(2**52 + 1)}))
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"step": 100_000_001, "num_tokens": float(2**52 + 1)}


@pytest.mark.parametrize("epoch", [10**6, 10**6 + 1, 2**31, 2**63])
def test_the_millionth_epoch_has_every_prompt_once_in_an_order_of_its_own(epoch: int) -> None:
    prompts = [Prompt(f"prompt {index}", "test", ({"role": "user", "content": "x"},), (2,), "c") for index in range(40)]
    found = order(prompts, 0, epoch)
    assert sorted(prompt.prompt_id for prompt in found) == sorted(prompt.prompt_id for prompt in prompts)
    assert found != order(prompts, 0, epoch + 1)
    assert found == order(prompts[::-1], 0, epoch)


@pytest.mark.parametrize("step", [2**31 - 1, 2**31, 2**32, 10**12])
def test_draws_of_very_late_steps_are_as_good_as_any(step: int) -> None:
    keys = torch.cat([row_keys(seed=0, step=step + offset, prompt_ids=["a", "b"], num_generations=8) for offset in range(4)])
    assert len(set(keys.tolist())) == 64  # no two completions draw the same numbers
    draws = torch.stack([uniforms(keys, torch.full((64,), place)) for place in (0, 1, 1000, 131_071)])
    assert bool(((draws >= 0) & (draws < 1)).all())
    assert len(set(draws.flatten().tolist())) == draws.numel()
    assert float(draws.mean()) == pytest.approx(0.5, abs=4 * (1 / 12 / draws.numel()) ** 0.5)


def test_controllers_count_on_beyond_a_million() -> None:
    signal, limit, guard = Signal(0), StepLimit(0.05), SpikeGuard(6.0)
    signal.load({"steps": 2.0**40, "without": 2.0**39, "in_a_row": 0.0})
    signal.update(1.0)
    assert (signal.steps, signal.without, signal.in_a_row) == (2**40 + 1, 2**39 + 1, 1)
    limit.load({"rollbacks": 2.0**40, "stopped_passes": 0.0})
    limit.after_update(1.0)
    assert limit.state()["rollbacks"] == 2.0**40 + 1
    for _ in range(100_000):
        guard.is_spike(1.5)
    assert guard.state()["weight"] < 1 / (1 - 0.98) + 1e-6  # fading: the sums stay what fifty norms make
    assert not guard.is_spike(1.6)
    assert guard.is_spike(3.0)
