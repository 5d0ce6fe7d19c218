"""What must not change the step: order, padding, the split into micro-batches. And what must: the stop token."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from functools import partial

import pytest
import torch
from torch import Tensor

from gemma_grpo.grpo.advantages import BASELINES, SCALES, group_advantages
from gemma_grpo.grpo.loss import AGGREGATIONS, KL_ESTIMATORS, POLICY_LOSSES, policy_objective, token_weights

NUM_PROMPTS, GROUP_SIZE, MAX_LENGTH = 4, 3, 6
VARIANTS = list(itertools.product(POLICY_LOSSES, AGGREGATIONS))


@dataclass(frozen=True)
class Step:
    """Everything one optimizer step's loss depends on; [B C] but for rewards [B]."""

    rewards: Tensor
    mask: Tensor
    logprobs: Tensor
    old: Tensor
    ref: Tensor
    entropy: Tensor

    def rows(self, rows: Tensor) -> Step:
        return Step(*(getattr(self, f.name)[rows] for f in fields(self)))

    def mapped(self, function: partial[Tensor]) -> Step:
        return Step(self.rewards, *(function(getattr(self, f.name)) for f in fields(self)[1:]))


def some_step(dtype: torch.dtype = torch.float64) -> Step:
    generator = torch.Generator().manual_seed(3)
    rows = NUM_PROMPTS * GROUP_SIZE
    lengths = torch.randint(1, MAX_LENGTH + 1, (rows, 1), generator=generator)
    mask = torch.arange(MAX_LENGTH) < lengths
    noise = [torch.randn(rows, MAX_LENGTH, generator=generator, dtype=dtype) for _ in range(4)]
    old = -noise[0].abs() - 0.1
    return Step(
        rewards=torch.randn(rows, generator=generator, dtype=dtype),
        mask=mask,
        logprobs=old + 0.2 * noise[1],
        old=old,
        ref=old + 0.5 * noise[2],
        entropy=noise[3].abs(),
    )


def loss_and_gradient(
    step: Step,
    loss: str = "ppo",
    aggregation: str = "dr_grpo",
    sizes: tuple[int, ...] | None = None,
    *,
    beta: float = 0.1,
    scale: str = "batch",
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The step's loss summed over micro-batches of `sizes` completions, its gradient [B C], its metrics summed likewise."""
    shape = (-1, GROUP_SIZE)
    advantages = group_advantages(
        step.rewards.reshape(shape), step.mask.sum(-1).reshape(shape), baseline=BASELINES["leave_one_out"], scale=SCALES[scale]
    ).reshape(-1)
    logprobs = step.logprobs.clone().requires_grad_()
    sizes = sizes or (len(logprobs),)
    assert sum(sizes) == len(logprobs)
    total, summed, start = logprobs.new_zeros(()), {}, 0
    for size in sizes:
        rows = slice(start, start + size)
        start += size
        weights = token_weights(
            step.mask[rows],
            aggregation=aggregation,
            num_step_completions=len(logprobs),
            num_step_tokens=int(step.mask.sum()),
            max_completion_length=MAX_LENGTH,
            num_micro_batches=len(sizes),
        )
        value, metrics = policy_objective(
            logprobs[rows],
            step.old[rows],
            advantages[rows],
            step.mask[rows],
            weights.to(logprobs),
            policy_loss=partial(POLICY_LOSSES[loss], clip_low=0.2, clip_high=0.2),
            ref_logprobs=step.ref[rows],
            kl_estimator=KL_ESTIMATORS["ratio_k3"],
            beta=beta,
            entropy=step.entropy[rows],
            alpha=0.1 * beta,
        )
        total = total + value
        summed = {name: summed.get(name, 0) + number for name, number in metrics.items()}
    return total.detach(), torch.autograd.grad(total, logprobs)[0], summed


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("loss", "aggregation"), [pair for pair in VARIANTS if pair[1] != "bnpo"])
@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (6, 6), (9, 3), (1,) * 12, (5, 7)])
def test_microbatch_losses_sum_to_the_step_loss(loss: str, aggregation: str, sizes: tuple[int, ...]) -> None:
    whole, gradient, metrics = loss_and_gradient(some_step(), loss, aggregation)
    pieces, piece_gradient, piece_metrics = loss_and_gradient(some_step(), loss, aggregation, sizes)
    assert_same(pieces, whole)
    assert_same(piece_gradient, gradient)
    for name, value in metrics.items():
        assert_same(piece_metrics[name], value)


def test_bnpo_is_the_one_aggregation_that_depends_on_the_split() -> None:
    whole, _, _ = loss_and_gradient(some_step(), aggregation="bnpo")
    assert_same(whole, loss_and_gradient(some_step(), aggregation="dapo")[0])
    singles, _, _ = loss_and_gradient(some_step(), aggregation="bnpo", sizes=(1,) * 12)
    assert_same(singles, loss_and_gradient(some_step(), aggregation="grpo")[0])
    assert abs(singles - whole) > 1e-3


@pytest.mark.parametrize(("loss", "aggregation"), VARIANTS)
def test_order_of_prompts_and_completions_does_not_matter(loss: str, aggregation: str) -> None:
    whole, gradient, _ = loss_and_gradient(some_step(), loss, aggregation)
    order = torch.arange(NUM_PROMPTS * GROUP_SIZE).reshape(NUM_PROMPTS, GROUP_SIZE)[[2, 0, 3, 1]][:, [1, 2, 0]].reshape(-1)
    permuted, permuted_gradient, _ = loss_and_gradient(some_step().rows(order), loss, aggregation)
    assert_same(permuted, whole)
    assert_same(permuted_gradient, gradient[order])


@pytest.mark.parametrize(("loss", "aggregation"), VARIANTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(loss: str, aggregation: str, side: str) -> None:
    whole, gradient, _ = loss_and_gradient(some_step(), loss, aggregation)
    pads = (3, 0) if side == "left" else (0, 3)
    padded, padded_gradient, _ = loss_and_gradient(some_step().mapped(partial(torch.nn.functional.pad, pad=pads)), loss, aggregation)
    real = slice(3, None) if side == "left" else slice(0, MAX_LENGTH)
    assert_same(padded, whole)
    assert_same(padded_gradient[:, real], gradient)
    assert padded_gradient.count_nonzero() == gradient.count_nonzero()


@pytest.mark.parametrize(("loss", "aggregation"), VARIANTS)
def test_tokens_after_the_stop_token_change_nothing_and_the_stop_token_does(loss: str, aggregation: str) -> None:
    step = some_step()
    whole, gradient, _ = loss_and_gradient(step, loss, aggregation)
    after = Step(step.rewards, step.mask, *(torch.where(step.mask, x, -7.0) for x in (step.logprobs, step.old, step.ref, step.entropy)))
    altered, altered_gradient, _ = loss_and_gradient(after, loss, aggregation)
    assert torch.equal(altered, whole)
    assert torch.equal(altered_gradient, gradient)
    last = step.mask & ~torch.nn.functional.pad(step.mask, (0, 1))[:, 1:]
    assert gradient[last].count_nonzero() >= len(gradient) // 2  # the rest may be clipped
    shorter = Step(step.rewards, step.mask & ~last, step.logprobs, step.old, step.ref, step.entropy)
    assert abs(loss_and_gradient(shorter, loss, aggregation)[0] - whole) > 1e-4


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_equal_rewards_leave_the_penalty_as_the_only_gradient(loss: str) -> None:
    step = some_step()
    flat = Step(torch.full_like(step.rewards, 0.1), step.mask, step.logprobs, step.old, step.ref, step.entropy)
    assert loss_and_gradient(flat, loss, beta=0.0)[1].count_nonzero() == 0
    assert loss_and_gradient(flat, loss, beta=0.1)[1].count_nonzero() == step.mask.sum()


@pytest.mark.parametrize(("loss", "aggregation"), VARIANTS)
def test_doubling_the_batch_keeps_the_loss_and_halves_each_copys_gradient(loss: str, aggregation: str) -> None:
    step = some_step()
    # unscaled: the batch std itself has a degree of freedom that doubling changes (test_advantages.py)
    whole, gradient, _ = loss_and_gradient(step, loss, aggregation, scale="none")
    double, double_gradient, _ = loss_and_gradient(step.rows(torch.arange(12).repeat(2)), loss, aggregation, scale="none")
    assert_same(double, whole)
    assert_same(2 * double_gradient[:12], gradient)


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_unscaled_rewards_scale_the_policy_gradient(loss: str) -> None:
    step = some_step()
    larger = Step(4 * step.rewards + 1, step.mask, step.logprobs, step.old, step.ref, step.entropy)
    _, gradient, _ = loss_and_gradient(step, loss, beta=0.0, scale="none")
    assert_same(loss_and_gradient(larger, loss, beta=0.0, scale="none")[1], 4 * gradient)


def test_float32_agrees_with_float64() -> None:
    _, exact, _ = loss_and_gradient(some_step())
    step = some_step()
    single = Step(step.rewards.float(), step.mask, step.logprobs.float(), step.old.float(), step.ref.float(), step.entropy.float())
    _, rounded, _ = loss_and_gradient(single)
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-4, atol=1e-7)
