"""What the bench runs: the lengths drawn, the prompts written for them, and the tokens that are forced."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean, median

import torch

from bench.growth import one_long
from bench.lengths import quantiles, read_lengths
from bench.random_checkpoint import SMALLEST, filler_tokenizer
from bench.step import MODELS, setting_of
from bench.workload import END_OF_TURN, EOS, LIMITS, WORKLOADS, draw_steps, force_lengths, prompt_texts, varied_reward


def test_the_committed_lengths_are_those_of_hh_rlhf() -> None:
    # measured on the whole files with Gemma's tokenizer: prompts p50 99, p99 533; replies about 45 on average, p95 114 to 138
    lengths = read_lengths()
    assert 90 <= median(lengths["prompts"]) <= 110
    assert 480 <= lengths["prompts"][494] <= 580
    assert 40 <= fmean(lengths["replies"]) <= 50
    assert 114 <= lengths["replies"][474] <= 138


def test_quantiles_are_the_middles_of_equal_parts() -> None:
    assert quantiles([4, 1, 3, 2], points=2) == [2, 4]
    assert quantiles(range(9), points=3) == [1, 4, 7]


def test_a_draw_follows_the_workload_and_nothing_but_its_seed() -> None:
    for workload in WORKLOADS:
        setting = setting_of("8m", workload, 1)
        steps = draw_steps(setting, 3)
        assert steps == draw_steps(setting, 5)[:3]
        assert steps != draw_steps(replace(setting, seed=1), 3)
        assert all(len(step.prompts) == 4 and len(step.completions) == 32 for step in steps)
        assert max(max(step.completions) for step in steps) <= LIMITS[workload]
    assert {length for step in draw_steps(setting_of("8m", "a", 1), 3) for length in step.completions} == {128}
    assert len({length for step in draw_steps(setting_of("8m", "b", 1), 3) for length in step.completions}) > 20
    assert min(length for step in draw_steps(setting_of("8m", "c", 1), 3) for length in step.prompts) > 400


def test_a_prompt_is_as_many_tokens_as_drawn() -> None:
    steps = draw_steps(setting_of("8m", "b", 1), 2)
    tokenizer = filler_tokenizer(SMALLEST.vocab_size)
    for step, texts in zip(steps, prompt_texts(steps), strict=True):
        ids = [tokenizer(text)["input_ids"] for text in texts]
        assert tuple(map(len, ids)) == step.prompts
        assert all(row[0] == tokenizer.bos_token_id for row in ids)


def test_the_smallest_shape_has_eight_million_parameters() -> None:
    assert 7.9e6 < SMALLEST.parameters < 8.1e6
    assert set(MODELS) >= {"8m", "270m", "4b"}


def test_forced_rows_stop_at_their_length_and_the_limit_cuts_without_a_stop() -> None:
    # lengths 1, 3 and the limit 3: at position 0 row 0 ends, at position 2 row 1 ends and row 2 is cut
    lengths, limit = torch.tensor([1, 3, 4]), 4
    for position, ends in [(0, [True, False, False]), (2, [False, True, False]), (3, [False, False, False])]:
        logits = force_lengths(torch.zeros(3, 120), torch.full((3,), position), lengths, limit)
        for row, end in enumerate(ends):
            allowed = torch.isfinite(logits[row])
            assert bool(allowed[END_OF_TURN]) is end
            assert not allowed[EOS]
            assert int(allowed.sum()) == (1 if end else 118)


def test_the_reward_differs_between_completions_of_one_length() -> None:
    rewards = varied_reward(["abcd", "abce", "zzzz"])
    assert len(set(rewards)) == 3
    assert rewards == varied_reward([[{"content": text}] for text in ("abcd", "abce", "zzzz")])
    assert all(0 <= reward < 1 for reward in rewards)


def test_one_long_completion_leaves_the_group_its_tokens() -> None:
    assert one_long(48, tokens=16 * 48, group=16) == [48] * 16
    lengths = one_long(512, tokens=16 * 48, group=16)
    assert (sum(lengths), max(lengths), min(lengths)) == (768, 512, 17)
