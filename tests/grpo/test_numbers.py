"""A number that is not finite, wherever it comes up, stops the step before anything is updated, and the message names where it is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gemma_grpo.grpo.explain import NoSignalError

WEIGHTS = [
    f"model.layers.{layer}.self_attn.{module}.lora_{factor}.policy.weight"
    for layer in (0, 1)
    for module in ("q_proj", "v_proj")
    for factor in "AB"
]
"""Every tensor that the small model's policy has."""
BASE = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]


def policy(world: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in world.model.adapter_parameters("policy").items()}


def assert_same(world: Any, before: dict[str, torch.Tensor]) -> None:
    now = policy(world)
    assert all(torch.equal(now[name], value) for name, value in before.items())


def test_the_list_of_weights_is_whole(world: Any) -> None:
    assert sorted(policy(world)) == sorted(WEIGHTS)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("passes", [1, 3], ids=["first pass", "third pass"])
def test_a_gradient_that_is_not_finite_is_named_and_updates_nothing_further(world: Any, name: str, passes: int) -> None:
    updater = world.updater(world.config(planning_steps=3))
    calls = 0

    def broken(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return gradient if calls < passes else gradient * math.nan

    before = policy(world)
    with world.model.role("policy", train=True):
        handle = world.model.adapter_parameters("policy")[name].register_hook(broken)
    try:
        with pytest.raises(FloatingPointError, match=rf"step 5: the gradient of {name} is not finite; nothing was updated"):
            updater.update(world.batch(world.config()), 4)
    finally:
        handle.remove()
    assert updater.intact
    if passes == 1:
        assert updater.passes is None
        assert_same(world, before)
    else:
        # two passes are made; the weights are those before the second, from whose gradient it is made again
        assert updater.passes.count == 2
        plain = world.updater(world.config(planning_steps=3))
        found, other = policy(world), {}
        with torch.no_grad():
            for weight, value in before.items():
                world.model.adapter_parameters("policy")[weight].copy_(value)
        gradient, _, _ = plain._accumulate(world.batch(world.config()))
        plain.optimizer.apply(gradient, plain.learning_rate(12))
        other = policy(world)
        assert all(torch.equal(found[weight], value) for weight, value in other.items())


def test_finite_gradients_whose_squares_are_not_have_a_finite_norm(world: Any) -> None:
    updater = world.updater(world.config(**{"optimizer.max_grad_norm": 1.0}))
    gradient = [torch.full_like(parameter, 1e30) for parameter in updater.parameters.values()]
    count = sum(tensor.numel() for tensor in gradient)
    norm = updater._checked_norm(gradient, {"loss": 0.0}, 0)
    assert norm == pytest.approx(1e30 * math.sqrt(count), rel=1e-6)  # 1e30 squared is beyond float32
    assert float(torch.linalg.vector_norm(torch.cat([tensor.flatten() for tensor in gradient]))) == pytest.approx(1.0, rel=1e-5)


def test_an_update_that_makes_a_weight_not_finite_is_taken_back(world: Any) -> None:
    # decay alone multiplies by 1 - 1e37 x 10: weights above 3.4 go beyond float32
    updater = world.updater(world.config(learning_rate=1e37, **{"optimizer.weight_decay": 10.0}))
    with torch.no_grad():
        for parameter in updater.parameters.values():
            parameter.mul_(200)
    before = policy(world)
    with pytest.raises(FloatingPointError, match=r"step 3: the update makes \S*lora_A\.policy\.weight not finite; it was taken back"):
        updater.update(world.batch(world.config()), 2)
    assert_same(world, before)
    assert updater.state()[0] == {}


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_advantages_that_are_not_finite_are_named_by_their_prompt(world: Any, value: float) -> None:
    rewards = [[0.1, 0.9, 0.4], [0.3, value, 0.2], [1.2, 0.0, 0.7], [-0.3, 0.6, 0.5]]
    if math.isnan(value):  # means not scored: the others are a group of two
        assert torch.isfinite(world.batch(world.config(), rewards).advantages).all()
        return
    with pytest.raises(FloatingPointError, match=rf"the advantages of prompt {world.groups[1].prompt.prompt_id} are not finite; nothing"):
        world.batch(world.config(), rewards)


@pytest.fixture
def poisoned(world: Any) -> Iterator[Callable[[str], None]]:
    """Makes one number of a weight NaN; put back afterwards, as the model is shared."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def poison(name: str) -> None:
        weight = dict(world.model.causal_lm.named_parameters())[name]
        kept.append((weight, weight.detach().clone()))
        with torch.no_grad():
            weight.view(-1)[weight.numel() // 2] = math.nan

    yield poison
    for weight, value in kept:
        with torch.no_grad():
            weight.copy_(value)


@pytest.mark.parametrize("name", [*WEIGHTS, *BASE])
def test_a_weight_that_is_not_finite_is_found_by_its_name(world: Any, poisoned: Callable[[str], None], name: str) -> None:
    assert world.model.not_finite() is None
    poisoned(name)
    assert world.model.not_finite() == name


@pytest.mark.parametrize("name", BASE[:3])
def test_a_reference_that_is_not_finite_stops_before_the_update(world: Any, poisoned: Callable[[str], None], name: str) -> None:
    before = policy(world)
    poisoned(name)
    with pytest.raises(FloatingPointError, match=r"the reference's log-probabilities of prompt \S+.* are not finite; nothing was updated"):
        world.batch(world.config())
    assert_same(world, before)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_run_whose_policy_breaks_ends_with_the_weight_named_and_its_checkpoint_whole(
    tiny_trainer: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    calls = 0

    def breaking(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 2:  # a cosmic ray, while the second step is being scored
            with torch.no_grad():
                trainer.model.adapter_parameters("policy")[name][0, 0] = math.nan
        return [sum(ids) / len(ids) / 100 for ids in completion_ids]

    trainer = tiny_trainer(reward=breaking, max_steps=3, save_steps=1, output_dir=str(tmp_path / "run"))
    with pytest.raises(FloatingPointError, match=r"not finite|is nan") as caught:
        trainer.train()
    text = str(caught.value)
    assert f"{name} is not finite." in text
    batch = tmp_path / "run" / "checkpoints" / "step-00000001" / "rollout.safetensors"
    assert f"The step's batch is in {batch}." in text
    assert load_file(batch)["completion_ids"].shape[:2] == (2, 3)
    info = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert info["status"] == "failed"
    assert info["error"].startswith("FloatingPointError: ")


# ---- spikes


def loud(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(ids) / len(ids) / 100 for ids in completion_ids]


def test_a_spike_is_left_out_counted_and_told(train_tiny: Callable[..., Any]) -> None:
    # 10^-9 standard deviations: of at least 0.1, so every norm above the mean of those before is one, once 20 were seen
    settings = {"reward": loud, "epochs": 9.0, "max_steps": 24, "planning_steps": 1, "kl.step_limit": None, "optimizer.spike_sigma": 1e-9}
    run = train_tiny(**settings)
    skipped, passes, norms = (run.metrics(name) for name in ("skipped_updates", "passes", "grad_norm"))
    assert skipped[:20] == [0.0] * 20
    left_out = [index for index in range(24) if passes[index] == 0.0]
    assert left_out
    assert skipped[-1] == len(left_out)
    warned = [line["text"] for line in run.lines("events.jsonl") if line["kind"] == "warn"]
    for index in left_out:
        assert any(f"step {index + 1}: the gradient's norm, {norms[index]:.3g}, is a spike beyond" in text for text in warned)
        assert run.metrics("learning_rate")[index] == 0.0


def test_a_spike_can_stop_the_run(tiny_trainer: Callable[..., Any], tmp_path: Path) -> None:
    settings = {"reward": loud, "epochs": 9.0, "max_steps": 24, "planning_steps": 1, "kl.step_limit": None, "optimizer.spike_sigma": 1e-9}
    settings |= {"optimizer.on_spike": "stop", "output_dir": str(tmp_path / "run")}
    with pytest.raises(FloatingPointError, match=r"step 2\d: the gradient's norm is \S+, beyond optimizer\.spike_sigma \(1e-09\) standard"):
        tiny_trainer(**settings).train()
    steps = len((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    assert steps >= 20
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:08d}").is_dir()


# ---- nothing to learn from


def constant(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [1.0] * len(completion_ids)


def nothing(completion_ids: list[list[int]], **columns: Any) -> list[None]:
    return [None] * len(completion_ids)


@pytest.mark.parametrize("reward", [constant, nothing])
def test_a_run_in_which_no_reward_told_anything_apart_is_no_success(tiny_trainer: Callable[..., Any], tmp_path: Path, reward: Any) -> None:
    folder = tmp_path / "run"
    settings = {"reward": reward, "max_steps": 2, "output_dir": str(folder)}
    text = r"in none of the 2 steps did a reward tell one completion of a prompt from another, so nothing was learned from rewards\."
    with pytest.raises(NoSignalError, match=text):
        tiny_trainer(**settings).train()
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert info["status"] == "failed"
    assert not (folder / "adapter").exists()
    with pytest.raises(NoSignalError, match=text):  # nor when it is tried again
        tiny_trainer(**settings).train(resume_from_checkpoint=True)


def test_a_signal_lost_for_so_many_steps_in_a_row_ends_the_run(tiny_trainer: Callable[..., Any], tmp_path: Path) -> None:
    calls = 0

    def fading(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        return loud(completion_ids) if calls == 1 else [0.0] * len(completion_ids)

    settings = {"reward": fading, "max_steps": 9, "advantage.no_signal_steps": 3, "output_dir": str(tmp_path / "run")}
    with pytest.raises(NoSignalError, match=r"for 3 steps in a row no reward told one completion of a prompt from another"):
        tiny_trainer(**settings).train()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["frac_reward_zero_std"] == 1.0 for line in metrics] == [False, True, True, True]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
