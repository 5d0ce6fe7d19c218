"""Counter-based randomness and the distribution that is drawn from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from gemma_grpo.rollout.sampling import draw, row_keys, sampling_logprobs, uniforms

LAST = 1 - 2.0**-53
"""The largest number uniforms can give."""


def many_uniforms(prompts: int = 50, group: int = 8, positions: int = 50) -> torch.Tensor:
    keys = row_keys(7, 3, [f"prompt {n}" for n in range(prompts)], group)
    return torch.stack([uniforms(keys, position) for position in range(positions)])  # (positions, rows)


def test_the_same_counters_give_the_same_numbers() -> None:
    assert torch.equal(many_uniforms(), many_uniforms())


def test_numbers_lie_in_the_unit_interval_and_are_pairwise_distinct() -> None:
    numbers = many_uniforms()
    assert numbers.dtype == torch.float64
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert len(numbers.unique()) == numbers.numel() == 20_000


def test_numbers_are_uniform_and_neighbours_are_unrelated() -> None:
    numbers = many_uniforms()
    counts = torch.histc(numbers, bins=100, min=0, max=1)
    assert chisquare(counts.numpy()).pvalue > 1e-3
    assert kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3
    for pairs in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):  # next position; next completion
        cells = (pairs[0] * 10).long() * 10 + (pairs[1] * 10).long()
        assert chisquare(torch.bincount(cells.flatten(), minlength=100).numpy()).pvalue > 1e-3


def test_it_is_splitmix64() -> None:
    # first outputs of the reference implementation (Vigna, prng.di.unimi.it/splitmix64.c) from state 1234567
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    found = [uniforms(torch.tensor([1234567]), position).item() for position in range(5)]
    assert found == [(value >> 11) * 2.0**-53 for value in expected]


@pytest.mark.parametrize("other", [(8, 3, "p", 0), (7, 4, "p", 0), (7, 3, "q", 0), (7, 3, "p", 1), (7, -1, "p", 0)])
def test_every_counter_matters(other: tuple[int, int, str, int]) -> None:
    seed, step, prompt, index = other
    first = row_keys(7, 3, ["p"], 1)[0]
    assert row_keys(seed, step, [prompt], index + 1)[index] != first


def test_a_rows_key_is_its_own_whatever_the_batch() -> None:
    together = row_keys(0, 0, ["a", "b", "c"], 4).view(3, 4)
    assert torch.equal(row_keys(0, 0, ["b"], 4), together[1])
    assert torch.equal(row_keys(0, 0, ["c", "a"], 2).view(2, 2), together[[2, 0], :2])


def test_a_batch_of_rows_draws_what_each_row_draws_alone() -> None:
    keys = row_keys(0, 0, ["a", "b"], 3)
    assert torch.equal(uniforms(keys, 5), torch.cat([uniforms(key[None], 5) for key in keys]))


def test_draw_inverts_the_cumulative_distribution() -> None:
    logprobs = torch.tensor([0.5, 0.25, 0.25]).log()
    numbers = torch.tensor([0.0, 0.4999, 0.5001, 0.7499, 0.7501, LAST], dtype=torch.float64)
    assert draw(logprobs.expand(6, 3), numbers).tolist() == [0, 0, 1, 1, 2, 2]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(0, 3), st.integers(0, 3))
def test_a_word_of_probability_zero_is_never_drawn(weights: list[float], before: int, after: int) -> None:
    probabilities = torch.tensor([0.0] * before + weights + [0.0] * after)
    logprobs = (probabilities / probabilities.sum()).log()
    drawn = draw(logprobs.expand(2, -1), torch.tensor([0.0, LAST], dtype=torch.float64)).tolist()
    assert drawn == [before, before + len(weights) - 1]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logprobs = sampling_logprobs(torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5]]), temperature=temperature)
    numbers = many_uniforms().flatten()
    counts = torch.bincount(draw(logprobs.expand(len(numbers), -1), numbers), minlength=5)
    assert chisquare(counts.numpy(), (logprobs[0].double().softmax(-1) * len(numbers)).numpy()).pvalue > 1e-3


def test_temperature_divides_the_logits() -> None:
    # logits 0 and ln 9 at temperature 2 are 0 and ln 3
    assert sampling_logprobs(torch.tensor([[0.0, math.log(9)]]), temperature=2.0).exp()[0].tolist() == pytest.approx([0.25, 0.75])


PROBABILITIES = torch.tensor([[0.1, 0.4, 0.2, 0.3]])


def filtered(**settings: float) -> list[float]:
    return sampling_logprobs(PROBABILITIES.log(), **settings).exp()[0].tolist()  # type: ignore[arg-type]


def test_filters_are_off_by_default() -> None:
    assert filtered() == pytest.approx([0.1, 0.4, 0.2, 0.3])


@pytest.mark.parametrize(
    ("k", "kept"), [(1, [0, 1, 0, 0]), (2, [0, 4 / 7, 0, 3 / 7]), (3, [0, 4 / 9, 2 / 9, 3 / 9]), (4, [0.1, 0.4, 0.2, 0.3])]
)
def test_top_k_keeps_the_k_most_likely_renormalised(k: int, kept: list[float]) -> None:
    assert filtered(top_k=k) == pytest.approx(kept)


def test_top_k_above_the_vocabulary_keeps_all() -> None:
    assert filtered(top_k=64) == pytest.approx([0.1, 0.4, 0.2, 0.3])


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        (0.01, [0, 1, 0, 0]),
        (0.39, [0, 1, 0, 0]),
        (0.41, [0, 4 / 7, 0, 3 / 7]),
        (0.69, [0, 4 / 7, 0, 3 / 7]),
        (0.71, [0, 4 / 9, 2 / 9, 3 / 9]),
        (0.91, [0.1, 0.4, 0.2, 0.3]),
        (1.0, [0.1, 0.4, 0.2, 0.3]),
    ],
)
def test_top_p_keeps_the_smallest_set_of_that_mass_renormalised(p: float, kept: list[float]) -> None:
    assert filtered(top_p=p) == pytest.approx(kept)


def test_top_p_acts_on_what_top_k_left_and_both_after_temperature() -> None:
    # top-k 3 leaves 4/9, 3/9, 2/9; the first two of them hold 7/9
    assert filtered(top_k=3, top_p=0.7) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    # at temperature 1/2 the shares are 1, 16, 4, 9 of 30: the first alone holds 16/30
    assert filtered(temperature=0.5, top_p=0.5) == pytest.approx([0, 1, 0, 0])
    assert filtered(temperature=0.5, top_p=0.54) == pytest.approx([0, 16 / 25, 0, 9 / 25])


def test_a_filtered_out_word_has_log_probability_minus_infinity() -> None:
    assert sampling_logprobs(PROBABILITIES.log(), top_k=1)[0].tolist() == [-math.inf, 0.0, -math.inf, -math.inf]


def test_not_a_number_stays_visible() -> None:
    logits = torch.tensor([[0.0, math.nan], [0.0, math.inf]])
    for settings_ in ({}, {"top_k": 1}, {"top_p": 0.5}):
        assert sampling_logprobs(logits, **settings_).amax(-1).isnan().all()  # type: ignore[arg-type]
