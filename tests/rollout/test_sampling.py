"""Counter-based randomness and the distribution that is drawn from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from gemma_grpo.rollout.sampling import BLOCK, draw, filtered, row_keys, uniforms

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
    assert draw(logprobs.expand(6, 3), numbers)[0].tolist() == [0, 0, 1, 1, 2, 2]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(0, 3), st.integers(0, 3))
def test_a_word_of_probability_zero_is_never_drawn(weights: list[float], before: int, after: int) -> None:
    probabilities = torch.tensor([0.0] * before + weights + [0.0] * after)
    logprobs = (probabilities / probabilities.sum()).log()
    drawn = draw(logprobs.expand(2, -1), torch.tensor([0.0, LAST], dtype=torch.float64))[0].tolist()
    assert drawn == [before, before + len(weights) - 1]


def test_draws_follow_the_distribution_and_say_their_probability() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5]])
    numbers = many_uniforms().flatten()
    drawn, logprobs = draw(logits.expand(len(numbers), -1), numbers)
    exact = logits[0].double().log_softmax(-1)
    assert chisquare(torch.bincount(drawn, minlength=5).numpy(), (exact.exp() * len(numbers)).numpy()).pvalue > 1e-3
    assert (logprobs - exact[drawn]).abs().max() < 1e-6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 2 * BLOCK + 3), st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 10.0]), st.booleans())
def test_two_levels_draw_what_one_sum_over_the_vocabulary_draws(width: int, seed: int, spread: float, turned: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(16, width, generator=generator) * spread
    numbers = torch.rand(16, generator=generator, dtype=torch.float64)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    plain = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)[:, 0]
    drawn, logprobs = draw(logits.t().contiguous().t() if turned else logits, numbers)
    # float32 masses move a border by some 1e-7: only a number that near may fall on its other side
    borders = (cumulative - numbers[:, None]).abs().amin(-1)
    assert torch.equal(drawn[borders > 1e-6], plain[borders > 1e-6])
    assert (logprobs - logits.double().log_softmax(-1).gather(-1, drawn[:, None])[:, 0]).abs().max() < 1e-5


def test_a_rare_word_at_the_end_of_a_block_is_not_drawn_for_the_rounding_of_its_neighbours() -> None:
    # 511 words hold all but 1e-30 of a block: what float32 rounds off their sum must not fall to the last one
    logits = torch.cat([torch.rand(BLOCK - 1, generator=torch.Generator().manual_seed(0)), torch.tensor([-69.0])])[None]
    numbers = 1 - torch.logspace(-15, -7, 400, dtype=torch.float64)
    assert BLOCK - 1 not in draw(logits.expand(400, -1), numbers)[0].tolist()


PROBABILITIES = torch.tensor([[0.1, 0.4, 0.2, 0.3]])


def shares(temperature: float = 1.0, **settings: float) -> list[float]:
    return filtered(PROBABILITIES.log() / temperature, **settings).softmax(-1)[0].tolist()  # type: ignore[arg-type]


def test_filters_are_off_by_default() -> None:
    assert shares() == pytest.approx([0.1, 0.4, 0.2, 0.3])


@pytest.mark.parametrize(
    ("k", "kept"), [(1, [0, 1, 0, 0]), (2, [0, 4 / 7, 0, 3 / 7]), (3, [0, 4 / 9, 2 / 9, 3 / 9]), (4, [0.1, 0.4, 0.2, 0.3])]
)
def test_top_k_keeps_the_k_most_likely_renormalised(k: int, kept: list[float]) -> None:
    assert shares(top_k=k) == pytest.approx(kept)


def test_top_k_above_the_vocabulary_keeps_all() -> None:
    assert shares(top_k=64) == pytest.approx([0.1, 0.4, 0.2, 0.3])


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
    assert shares(top_p=p) == pytest.approx(kept)


def test_top_p_acts_on_what_top_k_left_and_both_after_temperature() -> None:
    # top-k 3 leaves 4/9, 3/9, 2/9; the first two of them hold 7/9
    assert shares(top_k=3, top_p=0.7) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    # at temperature 1/2 the shares are 1, 16, 4, 9 of 30: the first alone holds 16/30
    assert shares(temperature=0.5, top_p=0.5) == pytest.approx([0, 1, 0, 0])
    assert shares(temperature=0.5, top_p=0.54) == pytest.approx([0, 16 / 25, 0, 9 / 25])


def test_a_filtered_out_word_is_never_drawn_and_the_rest_is_renormalised() -> None:
    assert filtered(PROBABILITIES.log(), top_k=1)[0].exp().tolist() == pytest.approx([0, 0.4, 0, 0])
    assert draw(filtered(PROBABILITIES.log(), top_k=1), torch.tensor([0.9], dtype=torch.float64)) == (1, 0.0)


def test_not_a_number_stays_visible() -> None:
    logits = torch.tensor([[0.0, math.nan], [0.0, math.inf]])
    for settings_ in ({}, {"top_k": 1}, {"top_p": 0.5}):
        assert draw(filtered(logits, **settings_), torch.tensor([0.1, 0.9], dtype=torch.float64))[1].isnan().all()  # type: ignore[arg-type]
