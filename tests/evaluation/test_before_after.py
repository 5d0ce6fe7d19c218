"""Laws and hand-worked cases of the before-after statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_grpo.evaluation import (
    EvaluatedReply,
    bootstrap_intervals,
    higher_score,
    is_harmful,
    summarise,
    swapped_preference,
)
from gemma_grpo.types import Completion, Prompt


def prompt(conversation: str, source: str = "helpful-base", columns: Mapping[str, Any] | None = None) -> Prompt:
    return Prompt(f"id-{conversation}", source, ({"role": "user", "content": "Hi"},), (2, 9), conversation, columns or {})


def completion(length: int, text: str = "Paris.") -> Completion:
    return Completion(text, tuple(range(length)), (-1.0,) * length, "stop")


def reply(conversation: str, score_before: float, score_after: float, **changes: Any) -> EvaluatedReply:
    """Gold and reward agree unless `changes` says otherwise."""
    scores = (score_before, score_after)
    base = EvaluatedReply(prompt(conversation), completion(2), completion(4), *scores, *scores, kl=1.0)
    return replace(base, **changes)


def two_replies() -> list[EvaluatedReply]:
    first = reply("a", 0.2, 0.6, before=completion(2), after=completion(3), kl=0.9)
    second = reply("b", 0.4, 0.4, before=completion(6), after=completion(7), kl=0.1)
    return [first, second]


def test_means_gain_and_ratio_of_sums_by_hand() -> None:
    result = summarise(two_replies(), seed=0, resamples=200)
    assert result["gold"]["before"] == pytest.approx(0.3)
    assert result["gold"]["after"] == pytest.approx(0.5)
    assert result["gold"]["gain"] == pytest.approx(0.2)
    assert result["gold"]["n"] == 2
    assert (result["length"]["before"], result["length"]["after"]) == (4.0, 5.0)
    assert result["kl"]["after"] == pytest.approx(0.1)  # (0.9 + 0.1) nat over 3 + 7 tokens, not the mean of 0.3 and 0.0143
    assert result["kl"]["before"] == 0.0
    assert result["kl_sequence"]["after"] == pytest.approx(0.5)
    assert result["conversations"] == 2


def test_interval_of_two_conversations_spans_the_three_possible_draws() -> None:
    # draws with replacement: (a,a) gain 0.4, (a,b) gain 0.2, (b,b) gain 0: a quarter, a half, a quarter
    low, high = summarise(two_replies(), seed=0, resamples=2000)["gold"]["interval"]
    assert (low, high) == (pytest.approx(0.0, abs=1e-12), pytest.approx(0.4))


def test_the_win_rate_is_judged_by_gold_where_known_and_counts_a_tie_as_half() -> None:
    result = summarise(two_replies(), seed=0, resamples=50)["win_rate"]
    assert (result["before"], result["after"], result["gain"], result["judge"]) == (0.5, 0.75, 0.25, "gold")


def test_without_gold_the_reward_judges_and_gold_is_left_out() -> None:
    replies = [replace(item, gold_before=None, gold_after=None, reward_after=-1.0) for item in two_replies()]
    result = summarise(replies, seed=0, resamples=50)
    assert "gold" not in result
    assert (result["win_rate"]["judge"], result["win_rate"]["after"]) == ("reward", 0.0)
    assert "gold" not in result["by_kind"]["helpful-base"]


def test_gold_known_for_some_is_averaged_over_those_and_does_not_judge() -> None:
    first, second = two_replies()
    result = summarise([first, replace(second, gold_before=None)], seed=0, resamples=50)
    assert (result["gold"]["n"], result["gold"]["gain"]) == (1, pytest.approx(0.4))
    assert result["gold"]["interval"] is None  # one conversation: nothing to resample
    assert result["win_rate"]["judge"] == "reward"


def test_a_judge_that_always_likes_the_first_place_gives_one_half() -> None:
    result = summarise(two_replies(), seed=0, resamples=50, prefer=lambda _prompt, _first, _second: 1.0)
    assert (result["win_rate"]["after"], result["win_rate"]["judge"]) == (0.5, "judge")


@given(st.floats(0, 1), st.floats(0, 1))
def test_swapping_the_replies_turns_p_into_one_minus_p(forward: float, backward: float) -> None:
    answers = {("x", "y"): forward, ("y", "x"): backward}

    def judge(_prompt: Prompt, first: str, second: str) -> float:
        return answers[first, second]

    p = swapped_preference(judge, prompt("a"), "x", "y")
    assert swapped_preference(judge, prompt("a"), "y", "x") == pytest.approx(1 - p)
    assert 0 <= p <= 1


@pytest.mark.parametrize("answer", [-0.1, 1.5, math.nan])
def test_a_judge_outside_zero_to_one_is_refused(answer: float) -> None:
    with pytest.raises(ValueError, match="a preference is a probability from 0 to 1"):
        swapped_preference(lambda _prompt, _first, _second: answer, prompt("a"), 1.0, 2.0)


def test_the_higher_score_wins_and_equal_scores_tie() -> None:
    assert [higher_score(prompt("a"), 2.0, other) for other in (1.0, 2.0, 3.0)] == [1.0, 0.5, 0.0]


def test_refusals_are_parted_by_the_harmful_column_and_else_by_source() -> None:
    refusal, answer = completion(3, "I'm sorry, but I can't help with that."), completion(3, "The capital of France is Paris.")
    harmful = reply("a", 0, 0, prompt=prompt("a", "harmless-base"), before=answer, after=refusal)
    benign = reply("b", 0, 0, prompt=prompt("b", "helpful-base"), before=refusal, after=answer)
    result = summarise([harmful, benign], seed=0, resamples=50)
    assert (result["refusal_harmful"]["before"], result["refusal_harmful"]["after"]) == (0.0, 1.0)
    assert (result["refusal_benign"]["before"], result["refusal_benign"]["after"]) == (1.0, 0.0)
    assert is_harmful(prompt("a", "miniature", {"harmful": True}))
    assert not is_harmful(prompt("a", "harmless-base", {"harmful": False}))


def test_a_metric_without_prompts_has_n_zero_and_no_numbers() -> None:
    result = summarise(two_replies(), seed=0, resamples=50)
    assert result["refusal_harmful"] == {"before": None, "after": None, "gain": None, "interval": None, "n": 0}
    assert result["refusal_benign"]["n"] == 2


def test_a_kind_that_falls_is_seen_beside_an_average_that_rises() -> None:
    good = [reply(f"g{i}", 0.2, 0.8, prompt=prompt(f"g{i}", columns={"kind": "greeting"})) for i in range(4)]
    bad = [reply(f"c{i}", 0.6, 0.3, reward_after=0.9, prompt=prompt(f"c{i}", columns={"kind": "code"})) for i in range(2)]
    result = summarise(good + bad, seed=0, resamples=50)
    assert result["gold"]["gain"] > 0
    assert list(result["by_kind"]) == ["code", "greeting"]
    code = result["by_kind"]["code"]
    assert (code["n"], code["gold"]["gain"], code["reward"]["gain"]) == (2, pytest.approx(-0.3), pytest.approx(0.3))


def test_samples_let_the_kinds_take_turns_and_stop_at_forty() -> None:
    many = [reply(f"m{i}", 0, 1, prompt=prompt(f"m{i}", columns={"kind": "many"})) for i in range(60)]
    few = [reply("f", 0, 1, prompt=prompt("f", columns={"kind": "few"}))]
    samples = summarise(many + few, seed=0, resamples=50)["samples"]
    assert len(samples) == 40
    assert [sample["kind"] for sample in samples[:3]] == ["few", "many", "many"]
    assert samples[0]["after"] == {"text": "Paris.", "reward": 1, "gold": 1}


def test_the_same_seed_gives_the_same_numbers_and_the_order_of_replies_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    replies = [reply(f"c{i % 7}", *rng.normal(size=2)) for i in range(20)]
    first, again, other = (summarise(replies, seed=seed, resamples=300) for seed in (1, 1, 2))
    assert first == again
    assert first["gold"]["interval"] != other["gold"]["interval"]
    turned = summarise(replies[::-1], seed=1, resamples=300)
    assert turned["gold"]["interval"] == pytest.approx(first["gold"]["interval"])


def gains_table(gains: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    rows = np.stack([np.zeros_like(gains), np.ones_like(gains), gains, np.ones_like(gains)], axis=-1)
    return rows[:, None, :]  # (items, one metric, 4)


def test_clustering_widens_the_interval_by_the_root_of_the_cluster_size() -> None:
    # 30 conversations of 9 replies that all agree: 9 times the replies carry no more than 30 independent numbers
    gains = np.repeat(np.random.default_rng(0).normal(size=30), 9)
    clustered = bootstrap_intervals([f"c{i // 9}" for i in range(270)], gains_table(gains), seed=0, resamples=4000)
    single = bootstrap_intervals([f"c{i}" for i in range(270)], gains_table(gains), seed=0, resamples=4000)
    assert clustered is not None
    assert single is not None
    assert float(np.diff(clustered[0])[0] / np.diff(single[0])[0]) == pytest.approx(3, rel=0.1)


def test_ninety_five_percent_intervals_cover_the_truth_about_ninety_five_times_in_a_hundred() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(300):
        conversations = rng.normal(size=40)
        gains = 0.5 + np.repeat(conversations, 3) + 0.5 * rng.normal(size=120)
        interval = bootstrap_intervals([f"c{i // 3}" for i in range(120)], gains_table(gains), seed=trial, resamples=500)
        assert interval is not None
        hits += bool(interval[0, 0] <= 0.5 <= interval[0, 1])
    # percentile intervals of 40 clusters cover about 94 %; 300 trials have a standard error of 1.3 %
    assert 0.90 <= hits / 300 <= 0.98


def test_a_gain_common_to_all_has_no_spread() -> None:
    replies = [reply(f"c{i}", i / 10, i / 10 + 0.25) for i in range(8)]
    assert summarise(replies, seed=0, resamples=100)["reward"]["interval"] == pytest.approx([0.25, 0.25])


def test_nothing_to_evaluate_and_broken_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="0 replies to evaluate"):
        summarise([], seed=0)
    with pytest.raises(ValueError, match="reward_after of prompt id-a is nan"):
        summarise([reply("a", 0.0, 0.0, reward_after=math.nan)], seed=0)
