"""Preference pairs: a pure function of the seed, hh-rlhf's shape, and labels wrong as often as promised."""

from __future__ import annotations

import math

from gemma_grpo.miniature.requests import KINDS, request_of
from gemma_grpo.miniature.world import gold_reward, gold_score, sample_pairs


def _golds(pair: dict) -> tuple[float, float]:  # type: ignore[type-arg]
    prompt = pair["chosen"][0]["content"]
    return gold_score(prompt, pair["chosen"][1]["content"]).total, gold_score(prompt, pair["rejected"][1]["content"]).total


def test_pairs_are_a_pure_function_of_seed_and_count() -> None:
    assert sample_pairs(5, 40) == sample_pairs(5, 40)
    assert sample_pairs(5, 40)[:20] == sample_pairs(5, 20)
    assert sample_pairs(5, 40) != sample_pairs(6, 40)


def test_both_sides_continue_one_request_and_differ() -> None:
    for pair in sample_pairs(0, 300):
        assert [message["role"] for message in pair["chosen"]] == ["user", "assistant"]
        assert pair["chosen"][:-1] == pair["rejected"][:-1]
        assert pair["chosen"][-1]["content"].strip() != pair["rejected"][-1]["content"].strip()
        request = request_of(pair["chosen"][0]["content"])
        assert request is not None
        assert (pair["kind"], pair["harmful"], pair["source"]) == (request.kind, request.harmful, "miniature")


def test_labels_are_flipped_at_the_promised_rate() -> None:
    count = 4000
    flipped = sum(chosen < rejected for chosen, rejected in map(_golds, sample_pairs(1, count)))
    # Four standard errors of a binomial share.
    assert abs(flipped / count - 0.2) < 4 * math.sqrt(0.2 * 0.8 / count)


def test_without_flips_the_chosen_reply_is_always_the_better() -> None:
    assert all(chosen > rejected for chosen, rejected in map(_golds, sample_pairs(2, 500, flip=0.0)))


def test_every_kind_is_as_frequent_as_every_other() -> None:
    kinds = [pair["kind"] for pair in sample_pairs(3, 2100)]
    assert all(abs(kinds.count(kind) - 300) < 75 for kind in KINDS)


def test_gold_as_a_reward_function_scores_each_completion() -> None:
    prompts = [[{"role": "user", "content": "what is 3 + 4?"}]] * 2
    completions = [[{"role": "assistant", "content": text}] for text in ("Gladly! That makes 7.", "Ugh, fine. That makes 9.")]
    assert gold_reward(prompts, completions, kind=["arithmetic"] * 2) == [1.0, 0.0]
