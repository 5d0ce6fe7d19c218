"""The judge of words: it learns what words tell, from each source what that source tells, and nothing from an order of pairs."""

from __future__ import annotations

import pytest

from gemma_grpo.reward.lexical import LexicalReward
from gemma_grpo.types import Completion, PreferencePair, Prompt, RolloutGroup


def pair(number: int, chosen: str, rejected: str, source: str = "a") -> PreferencePair:
    return PreferencePair(str(number), source, ({"role": "user", "content": "Hi"},), chosen, rejected)


POLITE = [pair(n, f"gladly, number {n}", f"ugh, number {n}") for n in range(20)]


def test_words_that_win_score_above_words_that_lose() -> None:
    good, bad, neither = LexicalReward(POLITE).score_texts(["gladly, it is blue", "ugh, it is blue", "it is blue"], ["a"] * 3)
    assert good > neither > bad


def test_each_source_is_its_own_and_another_gets_the_mean() -> None:
    reward = LexicalReward([*POLITE, *(pair(n, f"ugh, number {n}", f"gladly, number {n}", "b") for n in range(20))])
    texts = ["gladly, it is blue", "ugh, it is blue"]
    (good, bad), (low, high), (one, other) = (reward.score_texts(texts, [source] * 2) for source in ("a", "b", "c"))
    assert good > bad
    assert low < high
    assert one == pytest.approx(0.0, abs=1e-6)
    assert other == pytest.approx(0.0, abs=1e-6)


def test_the_order_of_the_pairs_does_not_matter_much_and_the_same_pairs_give_the_same_numbers() -> None:
    texts = ["gladly, it is blue", "ugh, it is blue"]
    first, again = (LexicalReward(POLITE).score_texts(texts, ["a", "a"]) for _ in range(2))
    assert first == again
    turned = LexicalReward(POLITE[::-1]).score_texts(texts, ["a", "a"])
    assert turned == pytest.approx(first, rel=0.05)


def test_groups_are_scored_in_their_shape_and_no_group_is_no_score() -> None:
    prompt = Prompt("p", "a", ({"role": "user", "content": "Hi"},), (2, 9), "c")
    completions = tuple(Completion(text, (7,), (-1.0,), "stop") for text in ("gladly", "ugh", ""))
    reward = LexicalReward(POLITE)
    (row,) = reward.score([RolloutGroup(prompt, completions, 0)])
    assert row[0] > row[2] > row[1]
    assert row[2] == 0.0
    assert reward.score([]) == []


def test_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="there are none"):
        LexicalReward([])
