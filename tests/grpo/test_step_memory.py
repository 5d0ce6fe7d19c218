"""A step's gradient, numbers and checkpoint are the same whatever a pass may hold, and however often memory ran out on the way."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_grpo.grpo.step import role_logprobs
from gemma_grpo.model.memory import DoesNotFitError, TokenBudget

ROUNDING = 2e-5
"""Of the largest entry of the gradient: float32 sums in another order."""
BUDGETS = [1, 40, 60, 100]
"""From one completion at a time to three groups: the groups have 31 to 47 tokens."""
ALIVE = {"entropy.threshold": 2.0, "loss.tis_cap": 2.0, "kl.beta": 0.2}
"""Every term of the loss."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_disable` is deprecated"),
]


@pytest.fixture(autouse=True)
def _unlimited_again(world: Any) -> Iterator[None]:
    yield
    world.model.budget = TokenBudget(None)


@contextmanager
def short_of_memory(module: torch.nn.Module, times: int, *, backward: bool = False, after: int = 0) -> Iterator[None]:
    """The module's forward (or backward) pass runs out of memory `times` times, after so many passes that did not."""
    passes = 0

    def fail(*args: Any) -> None:
        nonlocal passes
        passes += 1
        if after < passes <= after + times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = module.register_full_backward_pre_hook(fail) if backward else module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def second_pass(world: Any, config: Any, batch: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradient of a pass whose ratios are not 1: against log-probabilities of a policy some way off."""
    old = role_logprobs(world.model, batch, "policy", temperature=1.0)
    noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(3)) * batch.completion_mask
    return world.gradient(config, type(batch)(**{**vars(batch), "old_logprobs": old + 0.2 * noise}))


@pytest.mark.parametrize("loss", ["ppo", "gspo"])
@pytest.mark.parametrize("aggregation", ["dr_grpo", "grpo", "dapo", "bnpo"])
def test_no_token_budget_changes_the_gradient(world, difference, aggregation, loss):
    config = world.config(**ALIVE, **{"loss.aggregation": aggregation, "loss.type": loss})
    batch = world.batch(config)
    expected, sums = second_pass(world, config, batch)
    for tokens in BUDGETS:
        world.model.budget = TokenBudget(tokens)
        gradient, cut_sums = second_pass(world, config, batch)
        assert difference(gradient, expected) < ROUNDING
        assert cut_sums == pytest.approx(sums, rel=1e-4, abs=1e-6)


def test_the_micro_batch_of_bnpo_is_batch_size_prompts_whatever_fits(world, difference):
    gradients = []
    for size in (1, 2, 4):
        config = world.config(batch_size=size, **{"loss.aggregation": "bnpo"})
        whole, _ = world.gradient(config, world.batch(config))
        world.model.budget = TokenBudget(50)
        cut, _ = world.gradient(config, world.batch(config))
        world.model.budget = TokenBudget(None)
        assert difference(cut, whole) < ROUNDING
        gradients.append(whole)
    assert difference(gradients[0], gradients[2]) > 1e-2
    assert difference(gradients[1], gradients[2]) > 1e-2


@pytest.mark.parametrize("aggregation", ["dr_grpo", "grpo", "dapo", "bnpo"])
@pytest.mark.parametrize(("layer", "backward", "after"), [(1, False, 0), (1, False, 1), (0, True, 0), (0, True, 1)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_running_out_of_memory_changes_no_gradient(world, difference, aggregation, layer, backward, after, checkpointing):
    config = world.config(**ALIVE, **{"loss.aggregation": aggregation})
    batch = world.batch(config)
    expected, sums = world.gradient(config, batch)
    world.model.budget = TokenBudget(120)  # all four groups are 170: the first three, and the last
    if checkpointing:
        world.model.enable_gradient_checkpointing()
    # going back, the layer above has its gradient already when the memory ends
    with short_of_memory(world.model.causal_lm.model.layers[layer], 1, backward=backward, after=after):
        gradient, retried_sums = world.gradient(config, batch)
    world.model.causal_lm.gradient_checkpointing_disable()
    assert world.model.budget.halvings == 1
    assert difference(gradient, expected) < ROUNDING
    assert retried_sums == pytest.approx(sums, rel=1e-4, abs=1e-6)
    assert all(parameter.grad is None for parameter in world.model.causal_lm.parameters())


def test_an_update_that_ran_out_of_memory_is_the_update_and_says_so(world, difference):
    config = world.config(planning_steps=2, **{"kl.step_limit": 1.0, "optimizer.eps": 1e-3})
    batch, start = world.batch(config), world.weights()

    def updated(failures: int) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
        with torch.no_grad():
            for name, parameter in world.model.causal_lm.named_parameters():
                parameter.copy_(start[name])
        world.model.budget = TokenBudget(None)
        updater = world.updater(config)
        with short_of_memory(world.model.causal_lm.model.layers[0], failures, backward=True):
            metrics = [updater.update(batch, step) for step in range(2)]
        return {name: value - start[name] for name, value in world.weights().items()}, metrics

    whole, metrics = updated(0)
    retried, retried_metrics = updated(2)
    assert difference(retried, whole) < 1e-4
    assert [step["oom_retries"] for step in metrics] == [0.0, 0.0]
    assert not any("token_budget" in step for step in metrics)
    assert [step["oom_retries"] for step in retried_metrics] == [2.0, 2.0]  # remembered: the second step does not try again
    budget = world.model.budget.tokens
    assert [step["token_budget"] for step in retried_metrics] == [budget, budget]
    for name in metrics[1]:
        assert retried_metrics[1][name] == pytest.approx(metrics[1][name], rel=1e-3, abs=1e-6) or name == "oom_retries"


@pytest.mark.parametrize("tokens", BUDGETS)
@pytest.mark.parametrize("failures", [0, 1])
def test_scores_under_a_role_do_not_depend_on_what_fits(world, tokens, failures):
    batch = world.batch(world.config())
    expected = role_logprobs(world.model, batch, "policy", temperature=0.8)
    world.model.budget = TokenBudget(tokens + 60 * failures)
    with short_of_memory(world.model.causal_lm.model.layers[0], failures):
        found = role_logprobs(world.model, batch, "policy", temperature=0.8)
    assert world.model.budget.halvings == failures
    assert (found - expected).abs().max() < 1e-5


def test_the_distance_of_an_update_is_measured_in_pieces_too(world):
    config = world.config(**{"kl.placement": "off", "kl.step_limit": 1e6})
    batch, start = world.batch(config), world.weights()
    found = []
    for tokens in (None, 1):
        with torch.no_grad():
            for name, parameter in world.model.causal_lm.named_parameters():
                parameter.copy_(start[name])
        world.model.budget = TokenBudget(tokens)
        found.append(world.updater(config).update(batch, 0)["kl_step"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[0] > 1e-4


def test_a_step_that_does_not_fit_at_all_changes_nothing(world):
    config = world.config()
    updater, batch, before = world.updater(config), world.batch(config), world.weights()
    # the first group succeeds: what it gave must not be left somewhere
    world.model.budget = TokenBudget(40)
    with (
        short_of_memory(world.model.causal_lm.model.layers[0], 1000, backward=True, after=1),
        pytest.raises(DoesNotFitError, match="out of memory on cpu while learning: one completion of"),
    ):
        updater.update(batch, 0)
    now = world.weights()
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in world.model.causal_lm.parameters())
    assert not updater.state()[0]


# ---- a run that ran out of memory, and went on


def trained_short_of_memory(tiny_trainer: Callable[..., Any], passes: tuple[int, int], **settings: Any) -> tuple[Any, dict[str, Any]]:
    """A training in which (times, after) backward passes run out of memory."""
    trainer = tiny_trainer(**settings)
    trainer.dry_run()  # loads the model
    with short_of_memory(trainer.model.causal_lm.model.layers[0], passes[0], backward=True, after=passes[1]):
        return trainer, trainer.train()


def test_a_resumed_run_remembers_what_did_not_fit_and_repeats_bit_for_bit(tiny_trainer, tmp_path: Path):
    # two passes a step: memory ends in the second step, and the checkpoint after it is gone on from
    settings = {"max_steps": 4, "save_steps": 1, "planning_steps": 2, "evaluation.num_prompts": 3}
    trainer, evaluation = trained_short_of_memory(tiny_trainer, (1, 2), **settings)
    assert trainer.model.budget.halvings == 1
    folder = Path(shutil.copytree(trainer.run_dir, tmp_path / "again"))
    for step in (3, 4):
        shutil.rmtree(next((folder / "checkpoints").glob(f"step-*{step}")))
    shutil.rmtree(folder / "adapter")
    (folder / "evaluation.json").unlink()
    resumed = tiny_trainer(output_dir=str(folder), **settings)
    again = resumed.train(resume_from_checkpoint=True)
    assert resumed.model.budget.state() == trainer.model.budget.state()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (folder / name).read_text(encoding="utf-8") == (trainer.run_dir / name).read_text(encoding="utf-8"), name
    assert {**again, "seconds": 0} == {**evaluation, "seconds": 0}
