"""Streamed log-probabilities against dense ones, and the shift by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes
from torch import Tensor

from gemma_grpo.data.batch import GroupBatch, pad_groups
from gemma_grpo.model.attention import GroupLayout
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.logprobs import TILE, completion_logprobs, shifted, token_logprobs

WIDTH, VOCABULARY = 16, 37
TOKENS, WORDS = TILE["cpu"]


def dense(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The definition, all logits at once, in float64."""
    logprobs = (hidden.double() @ head.double().T / temperature).log_softmax(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def random_case(tokens: int, seed: int, dtype: torch.dtype = torch.float32, words: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(words, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, head, torch.randint(words, (tokens,), generator=generator)


def assert_streamed_is_dense(tokens: int, temperature: float, weights: tuple[float, float], seed: int = 0, words: int = VOCABULARY) -> None:
    hidden, head, targets = random_case(tokens, seed, words=words)
    generator = torch.Generator().manual_seed(seed + 1)
    cotangents = [weight * torch.randn(tokens, generator=generator) for weight in weights]
    results = []
    for function in (token_logprobs, dense):
        outputs = function(hidden, head, targets, temperature)
        loss = sum((output * cotangent).sum() for output, cotangent in zip(outputs, cotangents, strict=True))
        (gradient,) = torch.autograd.grad(loss, hidden)
        results.append((*(output.detach().double() for output in outputs), gradient.double()))
    for streamed, expected in zip(*results, strict=True):
        assert torch.allclose(streamed, expected, rtol=1e-5, atol=2e-6 / min(1.0, temperature) ** 2)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.floats(0.3, 3), st.tuples(st.floats(-2, 2), st.floats(-2, 2)), st.integers(0, 99))
def test_streamed_equals_dense_in_values_and_gradients(tokens: int, temperature: float, weights: tuple[float, float], seed: int) -> None:
    assert_streamed_is_dense(tokens, temperature, weights, seed)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        *((TOKENS + extra, VOCABULARY) for extra in (-1, 0, 1, TOKENS + 3)),
        *((3, WORDS + extra) for extra in (-1, 0, 1, WORDS + 3)),
        (TOKENS + 1, WORDS + 1),
    ],
)
def test_borders_of_tiles_show_nowhere(tokens: int, words: int) -> None:
    assert_streamed_is_dense(tokens, 0.7, (1.0, 0.5), words=words)


@pytest.mark.parametrize("largest", [0, WORDS - 1, WORDS, 2 * WORDS - 1, 2 * WORDS])
@pytest.mark.parametrize("target", [0, WORDS, 2 * WORDS])
def test_a_large_logit_in_any_tile_makes_earlier_sums_small_not_wrong(largest: int, target: int) -> None:
    hidden, head, _ = random_case(2, 0, words=2 * WORDS + 1)
    with torch.no_grad():
        head[largest] *= 40
    targets = torch.tensor([target, largest])
    results = []
    for function in (token_logprobs, dense):
        logprobs, entropy = function(hidden, head, targets, 1.0)
        results.append((logprobs, entropy, torch.autograd.grad(logprobs.sum() + 2 * entropy.sum(), hidden)[0]))
    for streamed, expected in zip(*results, strict=True):
        assert (streamed.double() - expected.double()).norm() < 2e-5 * expected.double().norm() + 1e-5


def test_without_its_gradient_the_entropy_is_a_number_and_the_rest_the_same() -> None:
    hidden, head, targets = random_case(9, 0)
    logprobs, entropy = token_logprobs(hidden, head, targets, 0.8)
    others = token_logprobs(hidden, head, targets, 0.8, entropy_gradient=False)
    assert torch.equal(others[0], logprobs)
    assert torch.equal(others[1], entropy)
    assert not others[1].requires_grad
    gradients = [torch.autograd.grad(values.sum(), hidden)[0] for values in (logprobs, others[0])]
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("learning", [True, False])
def test_what_is_held_beside_the_result_does_not_grow_with_the_number_of_tokens(learning: bool) -> None:
    beside = []
    for tokens in (2 * TOKENS, 8 * TOKENS):
        hidden, head, targets = random_case(tokens, 0, words=2 * WORDS)
        with LiveBytes([hidden, head, targets]) as live, torch.set_grad_enabled(learning):
            logprobs, _ = token_logprobs(hidden, head, targets, entropy_gradient=False)
            if learning:
                torch.autograd.grad(logprobs.sum(), hidden)
        # two numbers for each token, and learning one vector of float32, its gradient and what becomes of it on the way
        result = tokens * 4 * (2 + (2 + 3 * WIDTH) * learning)
        beside.append(live.peak - result)
    assert beside[1] <= beside[0]
    assert beside[0] < 3.2 * TOKENS * WORDS * 4


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_log_probability_and_entropy_have_each_its_own_gradient(weights: tuple[float, float]) -> None:
    assert_streamed_is_dense(9, 1.0, weights)


def test_hand_computed_two_words() -> None:
    # logits (ln 3, 0): probabilities 3/4 and 1/4; at temperature 1/2 they are 9/10 and 1/10
    hidden, head = torch.tensor([[1.0], [1.0]]), torch.tensor([[3.0], [1.0]]).log()
    logprobs, entropy = token_logprobs(hidden, head, torch.tensor([0, 1]))
    assert logprobs.exp().tolist() == pytest.approx([0.75, 0.25])
    assert entropy.tolist() == pytest.approx([0.5623351, 0.5623351])  # 3/4 ln(4/3) + 1/4 ln 4
    logprobs, _ = token_logprobs(hidden, head, torch.tensor([0, 1]), 0.5)
    assert logprobs.exp().tolist() == pytest.approx([0.9, 0.1])


def test_no_token_gives_no_number_and_no_gradient() -> None:
    hidden, head, targets = random_case(0, 0)
    logprobs, entropy = token_logprobs(hidden, head, targets)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, WIDTH)


def test_the_head_gets_no_gradient() -> None:
    hidden, head, targets = random_case(4, 0)
    token_logprobs(hidden, head, targets)[0].sum().backward()
    assert head.grad is None


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[500.0], [-500.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 1]))
    assert logprobs.tolist() == [-1000.0, 0.0]
    assert entropy.tolist() == [0.0, 0.0]
    (logprobs + entropy).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[:, 0].tolist() == pytest.approx([-2.0, 0.0])  # d(-2h)/dh where the unlikely word was drawn


def test_bfloat16_hidden_states_give_float32_log_probabilities() -> None:
    # against the same rounded numbers in float64: only the rounding of the gradient to bfloat16 is left
    hidden, head, targets = random_case(TOKENS + 5, 0, torch.bfloat16)
    results = []
    for function in (token_logprobs, dense):
        logprobs, entropy = function(hidden, head, targets, 0.8)
        (gradient,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), hidden)
        results.append((logprobs.detach(), entropy.detach(), gradient))
    (streamed, expected) = results
    assert (streamed[0].dtype, streamed[1].dtype, streamed[2].dtype) == (torch.float32, torch.float32, torch.bfloat16)
    assert torch.allclose(streamed[0].double(), expected[0], atol=1e-5)
    assert torch.allclose(streamed[1].double(), expected[1], atol=1e-5)
    assert (streamed[2].double() - expected[2].double()).norm() < 0.01 * expected[2].double().norm()


def test_each_token_is_predicted_by_the_one_before_it_and_the_first_by_the_prompts_last() -> None:
    layout = GroupLayout(pad_groups([[2, 11, 12], [2, 21]], [[[31, 32, 106], [33, 106]], [[41, 106], []]]))
    # packed: [2 11 12 | 2 21 | 31 32 106 | 33 106 | 41 106]
    assert shifted(layout).tolist() == [2, 5, 6, 2, 8, 4, 10]


@pytest.fixture(scope="module")
def model(new_gemma: Callable[..., Gemma]) -> Gemma:
    return new_gemma(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=4)


BATCH = pad_groups([[2, 150, 151, 152, 153, 154], [2, 170]], [[[210, 211, 212, 106], [220, 106]], [[106], [230, 231, 106]]])


def loss_and_gradient(model: Gemma, batch: GroupBatch) -> tuple[float, Tensor]:
    """The policy gradient's loss, advantages 1, -1, 2, -2, over the tokens trained on."""
    advantages = torch.tensor([[1.0, -1.0], [2.0, -2.0]])[..., None]
    with model.role("policy", train=True):
        logprobs, _ = completion_logprobs(model, batch)
        loss = -(advantages * logprobs).sum()
        gradients = torch.autograd.grad(loss, list(model.adapter_parameters("policy").values()))
    return loss.item(), torch.cat([gradient.flatten() for gradient in gradients])


def test_padding_scores_zero(model: Gemma) -> None:
    with torch.no_grad(), model.role("policy"):
        logprobs, entropy = completion_logprobs(model, BATCH)
    assert not logprobs[~BATCH.completion_mask].any()
    assert not entropy[~BATCH.completion_mask].any()
    assert (logprobs[BATCH.completion_mask] < 0).all()
    assert (entropy[BATCH.completion_mask] > 0).all()


def test_tokens_after_the_stop_token_change_nothing(model: Gemma) -> None:
    altered = replace(BATCH, completion_ids=BATCH.completion_ids.masked_fill(~BATCH.completion_mask, 300))
    assert not torch.equal(altered.completion_ids, BATCH.completion_ids)
    loss, gradient = loss_and_gradient(model, BATCH)
    other_loss, other_gradient = loss_and_gradient(model, altered)
    assert other_loss == loss
    assert torch.equal(other_gradient, gradient)


def test_the_stop_token_is_trained_on(model: Gemma) -> None:
    ids = BATCH.completion_ids.clone()
    ids[0, 1, 1] = 1  # <eos> instead of <end_of_turn>
    loss, gradient = loss_and_gradient(model, BATCH)
    other_loss, other_gradient = loss_and_gradient(model, replace(BATCH, completion_ids=ids))
    assert abs(other_loss - loss) > 0.01
    assert (other_gradient - gradient).norm() > 0.01 * gradient.norm()
    without = BATCH.completion_mask.clone()
    without[0, 1, 1] = False
    assert abs(loss_and_gradient(model, replace(BATCH, completion_mask=without))[0] - loss) > 0.01


def test_temperature_divides_the_logits(model: Gemma) -> None:
    with torch.no_grad(), model.role("policy"):
        layout = GroupLayout(BATCH)
        logits = model.logits(model.hidden_states(layout))[shifted(layout)]
        for temperature in (0.7, 1.0, 1.9):
            expected = (logits / temperature).log_softmax(-1)
            logprobs, entropy = completion_logprobs(model, BATCH, temperature=temperature)
            mask = BATCH.completion_mask
            picked = expected.gather(-1, BATCH.completion_ids[mask][:, None])[:, 0]
            assert torch.allclose(logprobs[mask], picked, atol=1e-5)
            assert torch.allclose(entropy[mask], -(expected.exp() * expected).sum(-1), atol=1e-5)


def test_finite_differences_agree_with_the_gradient_through_the_whole_model(model: Gemma) -> None:
    # float32 leaves about four digits of a difference of losses: a step of 3e-3 balances rounding against curvature
    _, gradient = loss_and_gradient(model, BATCH)
    parameters = list(model.adapter_parameters("policy").values())
    sizes = [parameter.numel() for parameter in parameters]
    generator, step = torch.Generator().manual_seed(0), 3e-3
    for coordinate in torch.randint(sum(sizes), (20,), generator=generator).tolist():
        which = next(i for i in range(len(sizes)) if coordinate < sum(sizes[: i + 1]))
        flat = parameters[which].detach().view(-1)  # shares the weight's memory
        index = coordinate - sum(sizes[:which])
        start = flat[index].item()
        losses = []
        for sign in (1, -1):
            flat[index] = start + sign * step
            losses.append(loss_and_gradient(model, BATCH)[0])
        flat[index] = start
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(gradient[coordinate].item(), rel=0.02, abs=5e-3)
