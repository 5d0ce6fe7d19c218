"""One rollout batch into weights: what the first and the second pass compute, what a bad number stops, what is taken back."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from gemma_grpo.grpo.update import PolicyUpdater

NO_KL: dict[str, Any] = {"kl.placement": "off"}


def adapter(world: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in world.model.adapter_parameters("policy").items()}


def assert_unchanged(world: Any, before: dict[str, torch.Tensor]) -> None:
    now = world.weights()
    assert all(torch.equal(now[name], value) for name, value in before.items())


# ---- the first pass


def test_with_one_pass_the_loss_is_reinforce(world, difference):
    config = world.config(**NO_KL)
    batch = world.batch(config)
    advantages, lengths = batch.advantages, batch.completion_mask.sum(-1)
    gradient, sums = world.gradient(config, batch)

    def reinforce(logprobs, entropies):
        return -(advantages[..., None] * logprobs).sum() / (12 * 6)  # 12 completions of at most 6 tokens

    _, expected = world.plain_gradient(reinforce, batch)
    assert difference(gradient, expected) < 1e-5
    # the ratio is 1, so the value is that of the advantages alone
    assert sums["loss"] == pytest.approx(float(-(advantages * lengths).sum()) / (12 * 6), abs=1e-6)


@pytest.mark.parametrize("loss", ["gspo", "cispo", "sapo"])
def test_every_loss_starts_from_the_same_gradient(world, difference, loss):
    # with the grpo weights 1 / length, whose sum over tokens undoes gspo's mean over them
    config, other = (world.config(**NO_KL, **{"loss.aggregation": "grpo", "loss.type": name}) for name in ("ppo", loss))
    batch = world.batch(config)
    assert difference(world.gradient(other, batch)[0], world.gradient(config, batch)[0]) < 1e-5


def test_the_ratio_of_the_first_pass_is_exactly_one(world):
    tight = {"loss.clip_low": 1e-7, "loss.clip_high": 1e-7}
    metrics = world.updater(world.config(**NO_KL, **tight)).update(world.batch(world.config(**NO_KL)), 0)
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0.0
    assert metrics["passes"] == 1.0
    assert metrics["policy_loss"] == metrics["loss"]


def test_sampling_gap_is_measured_and_nothing_else_depends_on_the_samplers_numbers(world):
    config = world.config()
    batch = world.batch(config)
    other = replace(batch, sampling_logprobs=batch.sampling_logprobs - 0.25)
    first, second = (world.gradient(config, each)[0] for each in (batch, other))
    assert all(torch.equal(first[name], value) for name, value in second.items())
    with world.model.role("policy"), torch.no_grad():
        plain, _ = world.plain_logprobs(batch)
    gap = float((plain - batch.sampling_logprobs).abs()[batch.completion_mask].max())
    assert world.updater(config).update(batch, 0)["sampling_gap"] == pytest.approx(gap, abs=1e-5)


def test_kl_to_the_reference_is_measured_per_token_and_per_sequence(world):
    config = world.config()
    batch = world.batch(config)
    with world.model.role("policy"), torch.no_grad():
        policy, _ = world.plain_logprobs(batch)
    with world.model.role("reference"), torch.no_grad():
        reference, _ = world.plain_logprobs(batch)
    gap = (reference - policy)[batch.completion_mask]
    total = float((gap.exp() - 1 - gap).sum())  # k3, at ratio 1
    metrics = world.updater(config).update(batch, 0)
    assert metrics["kl"] == pytest.approx(total / 45, rel=1e-4)  # 45 tokens in 12 completions
    assert metrics["kl_sequence"] == pytest.approx(total / 12, rel=1e-4)


def test_the_temperature_is_that_of_policy_and_reference_alike(world, difference):
    config = world.config(temperature=0.6)
    batch = world.batch(config)
    with world.model.role("reference"), torch.no_grad():
        reference, _ = world.plain_logprobs(batch, temperature=0.6)

    def penalised(logprobs, entropies):
        gap = torch.where(batch.completion_mask, reference - logprobs, 0.0)
        ratio = torch.exp(logprobs - logprobs.detach())
        return (ratio * (0.05 * (gap.exp() - 1 - gap) - batch.advantages[..., None]) * batch.completion_mask).sum() / (12 * 6)

    loss, expected = world.plain_gradient(penalised, batch, temperature=0.6)
    gradient, sums = world.gradient(config, batch)
    assert difference(gradient, expected) < 1e-5
    assert sums["loss"] == pytest.approx(loss, rel=1e-4)


# ---- further passes


def test_the_second_pass_is_clipped_against_the_first_passes_log_probabilities(world, difference):
    config = world.config(**NO_KL, planning_steps=2, **{"optimizer.eps": 1e-3})
    batch = world.batch(config)
    advantages, mask = batch.advantages[..., None], batch.completion_mask
    parameters = world.model.adapter_parameters("policy")
    start = adapter(world)

    world.updater(config).update(batch, 0)
    updated = adapter(world)

    with torch.no_grad():
        for name, value in start.items():
            parameters[name].copy_(value)
    with world.model.role("policy"), torch.no_grad():
        old, _ = world.plain_logprobs(batch)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.0)

    def clipped(logprobs, entropies):
        ratio = torch.where(mask, logprobs - old, 0.0).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return -torch.where(mask, gain, 0.0).sum() / (12 * 6)

    for _ in range(2):
        _, gradient = world.plain_gradient(clipped, batch)
        for name, parameter in parameters.items():
            parameter.grad = gradient[name]
        optimizer.step()
    moved = {name: updated[name] - start[name] for name in start}
    assert difference(moved, {name: parameters[name].detach() - start[name] for name in start}) < 1e-3
    assert max(float(value.abs().max()) for value in moved.values()) > 5e-3


def test_clip_shares_are_those_of_the_last_pass(world):
    config = world.config(**NO_KL, planning_steps=2, learning_rate=0.1)
    metrics = world.updater(config).update(world.batch(config), 0)
    assert metrics["clip_ratio/high_mean"] > 0.1
    assert metrics["clip_ratio/low_mean"] > 0.0
    assert metrics["passes"] == 2.0


def test_an_update_makes_better_completions_likelier(world):
    config = world.config(**NO_KL, planning_steps=2, learning_rate=3e-3)
    batch = world.batch(config)

    def weighted_log_likelihood():
        with world.model.role("policy"), torch.no_grad():
            return float((batch.advantages[..., None] * world.plain_logprobs(batch)[0]).sum())

    before = weighted_log_likelihood()
    world.updater(config).update(batch, 0)
    assert weighted_log_likelihood() > before + 1


# ---- numbers that must not get into the weights


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_updates_nothing(world, value):
    config = world.config(planning_steps=2)
    updater, batch = world.updater(config), world.batch(config)
    updater.update(batch, 0)
    before, (moments, _) = world.weights(), updater.state()
    bad = replace(batch, advantages=batch.advantages.clone().index_fill_(0, torch.tensor([1]), value))
    with pytest.raises(FloatingPointError, match=r"step 2: the loss is (nan|inf|-inf); nothing was updated. Lower learning_rate."):
        updater.update(bad, 1)
    assert_unchanged(world, before)
    now, _ = updater.state()
    assert all(torch.equal(now[name], moment) for name, moment in moments.items())


def test_a_gradient_that_is_not_finite_is_named_and_updates_nothing(world):
    config = world.config(**NO_KL, temperature=1e-3)
    updater, batch = world.updater(config), world.batch(config)
    updater.update(batch, 0)
    before, (moments, _) = world.weights(), updater.state()
    # +a and -a on two completions of one length: a loss of 0 whose gradient, at this temperature, is beyond float32
    huge = torch.zeros_like(batch.advantages)
    huge[2, 0], huge[2, 1] = 3e38, -3e38
    with pytest.raises(
        FloatingPointError, match=r"step 8: the gradient of \S*lora_[AB]\.policy\.weight is not finite; nothing was updated"
    ):
        updater.update(replace(batch, advantages=huge), 7)
    assert_unchanged(world, before)
    now, _ = updater.state()
    assert all(torch.equal(now[name], moment) for name, moment in moments.items())


def test_a_second_pass_that_is_not_finite_takes_the_first_one_back(world):
    config = world.config(**NO_KL, planning_steps=3, learning_rate=1e30)
    updater, before = world.updater(config), world.weights()
    with pytest.raises(FloatingPointError, match="nothing was updated"):
        updater.update(world.batch(config), 0)
    assert_unchanged(world, before)
    assert not updater.state()[0]


def test_only_the_policys_adapter_moves(world):
    config = world.config(planning_steps=2)
    before = world.weights()
    world.updater(config).update(world.batch(config), 0)
    now = world.weights()
    moved = {name for name, value in before.items() if not torch.equal(now[name], value)}
    assert moved == set(world.model.adapter_parameters("policy"))
    assert all(parameter.grad is None for parameter in world.model.causal_lm.parameters())


# ---- the step limit


def full_step_kl(world: Any) -> float:
    """How far one whole update goes, in nats per token."""
    config = world.config(**NO_KL, **{"kl.step_limit": 1e6})
    start = adapter(world)
    kl = world.updater(config).update(world.batch(config), 0)["kl_step"]
    with torch.no_grad():
        for name, parameter in world.model.adapter_parameters("policy").items():
            parameter.copy_(start[name])
    return kl


def limited(world: Any, share: float, **settings: Any) -> tuple[PolicyUpdater, dict[str, float], dict[str, torch.Tensor]]:
    """An update under a limit of `share` of the whole update's KL: the updater, the metrics, and how far each weight went."""
    limit = share * full_step_kl(world)
    config = world.config(**NO_KL, **{"kl.step_limit": limit}, **settings)
    start = adapter(world)
    updater = world.updater(config)
    metrics = updater.update(world.batch(config), 0)
    return updater, metrics, {name: value - start[name] for name, value in adapter(world).items()}


def test_the_step_kl_is_that_of_the_old_policy_to_the_new_one(world):
    config = world.config(**NO_KL, **{"kl.step_limit": 1e6})
    batch = world.batch(config)
    with world.model.role("policy"), torch.no_grad():
        old, _ = world.plain_logprobs(batch)
    kl = world.updater(config).update(batch, 0)["kl_step"]
    with world.model.role("policy"), torch.no_grad():
        new, _ = world.plain_logprobs(batch)
    gap = (new - old)[batch.completion_mask]
    assert kl == pytest.approx(float((gap.exp() - 1 - gap).mean()), rel=1e-3)


def test_an_update_within_the_limit_is_kept(world):
    _, metrics, moved = limited(world, 1.1)
    assert metrics["rollbacks"] == 0
    assert max(float(value.abs().max()) for value in moved.values()) == pytest.approx(1e-2, rel=1e-3)  # Adam's first step


def test_an_update_over_one_and_a_half_times_the_limit_is_taken_again_with_half_the_rate(world):
    # KL grows with the square of the way: half the step has about a quarter of it, below 1.5 x 0.4
    _, metrics, moved = limited(world, 0.4)
    assert metrics["rollbacks"] == 1
    assert max(float(value.abs().max()) for value in moved.values()) == pytest.approx(0.5e-2, rel=1e-3)


@pytest.mark.parametrize("passes", [1, 2])
def test_an_update_that_no_halving_saves_leaves_weights_and_optimizer_as_they_were(world, passes):
    updater, metrics, moved = limited(world, 1e-4, planning_steps=passes)
    assert metrics["rollbacks"] == 3  # the whole update, half of it, a quarter
    assert metrics["passes"] == 1
    assert all(value.count_nonzero() == 0 for value in moved.values())
    assert not updater.state()[0]


def test_above_the_limit_the_remaining_passes_are_left_out(world):
    updater, metrics, moved = limited(world, 0.8, planning_steps=3)
    assert (metrics["passes"], metrics["rollbacks"], updater.limit.stopped_passes) == (1, 0, 1)
    assert max(float(value.abs().max()) for value in moved.values()) == pytest.approx(1e-2, rel=1e-3)


def test_the_last_update_is_measured_when_it_may_have_gone_too_far(world):
    # two equal updates go twice as far, about 4 x the KL: above 1.5 x 1.2, which no later pass would notice
    _, metrics, _ = limited(world, 1.2, planning_steps=2)
    assert metrics["passes"] == 2
    assert metrics["rollbacks"] >= 1


# ---- rates and controllers


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),  # 2 updates of warm-up, then 4 down to 0
        ("cosine", [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_learning_rates_by_hand(world, schedule, expected):
    config = world.config(planning_steps=2, learning_rate=0.01, **{"optimizer.schedule": schedule, "optimizer.warmup_updates": 2})
    updater = world.updater(config, total_steps=3)
    assert [updater.learning_rate(update) / 0.01 for update in range(6)] == pytest.approx(expected)


def test_each_pass_has_its_own_learning_rate(world):
    config = world.config(planning_steps=2, **{"optimizer.schedule": "linear"})
    updater = world.updater(config, total_steps=2)
    rates = [updater.update(world.batch(config), step)["learning_rate"] for step in range(2)]
    assert rates == pytest.approx([0.75e-2, 0.25e-2])  # of the last pass: updates 1 and 3 of 4


@pytest.mark.parametrize(("target", "factor"), [(100.0, 0.98), (1e-6, 1.02)])
def test_beta_follows_the_kl_after_the_step(world, target, factor):
    config = world.config(**{"kl.ref_target": target, "kl.beta": 0.1})
    updater, batch = world.updater(config), world.batch(config)
    betas = [updater.update(batch, step)["beta"] for step in range(3)]
    assert betas == pytest.approx([0.1, 0.1 * factor, 0.1 * factor**2])


def test_training_is_over_budget_after_the_kl_was_too_large_for_too_long(world):
    config = world.config(**{"kl.ref_target": 1e-6, "kl.hard_stop_steps": 3})
    updater, batch = world.updater(config), world.batch(config)
    stops = []
    for step in range(3):
        updater.update(batch, step)
        stops.append(updater.over_budget())
    assert stops == [False, False, True]


def test_the_entropy_bonus_wakes_and_enters_the_gradient(world, difference):
    # a threshold of 2: any entropy counts as having fallen, from the first step on
    settings = {"kl.ref_target": None, "kl.beta": 0.5, "entropy.threshold": 2.0, "entropy.max_alpha_ratio": 0.4, "entropy.step": 0.25}
    config = world.config(**settings)
    updater, batch = world.updater(config), world.batch(config)
    asleep, _, _ = updater._accumulate(batch)
    updater.entropy.update(3.0)
    updater.entropy.update(3.0)
    alpha = updater.entropy.alpha(0.5)
    assert alpha == pytest.approx(0.5 * 0.4 * 0.5)  # level 2 x 0.25, of at most 0.4 x beta
    awake, _, _ = updater._accumulate(batch)

    _, bonus = world.plain_gradient(lambda logprobs, entropies: -alpha * entropies.sum() / (12 * 6), batch)
    change = {name: new - old for name, new, old in zip(updater.parameters, awake, asleep, strict=True)}
    assert difference(change, bonus) < 1e-4


def test_entropy_is_the_mean_over_tokens_and_sets_the_bonus(world):
    config = world.config(**{"entropy.threshold": 2.0, "entropy.step": 0.25})
    updater, batch = world.updater(config), world.batch(config)
    with world.model.role("policy"), torch.no_grad():
        _, entropies = world.plain_logprobs(batch)
    first, second = updater.update(batch, 0), updater.update(batch, 1)
    assert first["entropy"] == pytest.approx(float(entropies[batch.completion_mask].mean()), rel=1e-5)
    assert first["alpha"] == 0.0
    assert second["alpha"] == pytest.approx(0.25 * 0.1 * second["beta"])


# ---- what a checkpoint keeps


def test_state_and_load_continue_bit_for_bit(world):
    config = world.config(planning_steps=2, **{"kl.step_limit": 1.0, "kl.ref_target": 0.01, "entropy.threshold": 2.0})
    first, batch = world.updater(config), world.batch(config)
    first.update(batch, 0)
    start, (tensors, controllers) = adapter(world), first.state()
    expected, moved = first.update(batch, 1), adapter(world)

    with torch.no_grad():
        for name, parameter in world.model.adapter_parameters("policy").items():
            parameter.copy_(start[name])
    second = world.updater(config)
    second.load(tensors, controllers)
    assert second.update(batch, 1) == expected
    assert all(torch.equal(value, moved[name]) for name, value in adapter(world).items())
    for old, new in zip(first.state()[0].items(), second.state()[0].items(), strict=True):
        assert old[0] == new[0]
        assert torch.equal(old[1], new[1])
    assert first.state()[1] == second.state()[1]


def test_loaded_moments_lie_where_the_weights_are(world):
    # a checkpoint is read on the CPU: on a GPU the first update after a resume would find weights and moments apart
    config = world.config()
    updater = world.updater(config)
    updater.update(world.batch(config), 0)
    elsewhere = world.updater(config)
    elsewhere.optimizer.parameters = {name: torch.nn.Parameter(weight.detach().to("meta")) for name, weight in elsewhere.parameters.items()}
    elsewhere.load(*updater.state())
    for weight in elsewhere.optimizer.parameters.values():
        kept = elsewhere.optimizer.adamw.state[weight]
        assert {key: value.device.type for key, value in kept.items()} == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


def test_a_saved_state_is_a_copy(world):
    config = world.config()
    updater, batch = world.updater(config), world.batch(config)
    updater.update(batch, 0)
    tensors, controllers = updater.state()
    before = {name: value.clone() for name, value in tensors.items()}
    other = world.updater(config)
    other.load(tensors, controllers)
    other.update(batch, 1)
    assert all(torch.equal(tensors[name], value) for name, value in before.items())
