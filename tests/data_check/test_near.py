"""Nearness: what is called near is near by an exact count, equal texts always are, and work stays bounded however alike texts are."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_grpo.data_check import near
from gemma_grpo.data_check.near import NEAR, near_twins, normalised


def pieces(text: str) -> set[tuple[str, ...]]:
    words = text.split(" ")[: near.MAX_WORDS]
    return {tuple(words[n : n + 3]) for n in range(len(words) - 2)} or {tuple(words)}


def jaccard(one: str, other: str) -> float:
    return len(pieces(one) & pieces(other)) / len(pieces(one) | pieces(other))


def words(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [f"w{draw.randrange(10_000)}" for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  What,  is THIS?! ", "what is this"),
        ("Straße ＡＢＣ ½", "strasse abc 1 2"),
        ("你好 world", "你 好 world"),
        (" ?! ", "?!"),
        ("", ""),
    ],
)
def test_normalised_texts_by_hand(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_a_changed_word_in_forty_is_near_and_in_twenty_four_is_not() -> None:
    long, short = words(40, 1), words(24, 2)
    # 40 words have 38 pieces; a changed word in the middle is in 3 of them: 35 of 41 = 0.85. Of 24 words: 19 of 25 = 0.76.
    texts = [" ".join(one) for one in (long, [*long[:20], "other", *long[21:]], short, [*short[:12], "other", *short[13:]])]
    assert near_twins(texts) == [-1, 0, -1, -1]


def test_twins_are_sought_among_the_marked_only() -> None:
    one = " ".join(words(30, 1))
    assert near_twins([one, one, "something else", one], of=[False, True, True, False]) == [1, -1, -1, 1]
    assert near_twins([one, one], of=[False, False]) == [-1, -1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=14).map(" ".join), max_size=12), st.data())
def test_a_twin_is_near_by_an_exact_count_and_equal_texts_have_one(texts: list[str], data: st.DataObject) -> None:
    of = data.draw(st.none() | st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    for place, twin in enumerate(near_twins(texts, of)):
        if twin >= 0:
            assert jaccard(texts[place], texts[twin]) >= NEAR
            assert twin < place if of is None else of[twin] and not of[place]
        elif of is None:
            assert texts[place] not in texts[:place]
        else:
            assert of[place] or not any(marked and text == texts[place] for marked, text in zip(of, texts, strict=True))


def test_nearly_all_near_pairs_are_found() -> None:
    base = [words(60, seed) for seed in range(300)]
    edited = [[*text[:30], "other", *text[31:]] for text in base]  # 55 of 61 pieces: 0.90
    texts = [" ".join(text) for text in (*base, *edited)]
    found = near_twins(texts)
    assert found[:300] == [-1] * 300
    assert sum(found[300 + n] == n for n in range(300)) >= 299


def test_texts_without_words_and_none_at_all() -> None:
    assert near_twins([]) == []
    assert near_twins(["", "?!", ""]) == [-1, -1, 0]


def test_a_vocabulary_that_overflows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(words(20, seed % 10)) for seed in range(40)]
    expected = near_twins(texts)
    monkeypatch.setattr(near, "_VOCABULARY", 5)
    monkeypatch.setattr(near, "_CHUNK", 7)
    assert near_twins(texts) == expected


def test_many_texts_of_one_template_take_linear_time() -> None:
    def seconds(count: int) -> float:
        # half of each text is the template: all meet in the same bands, none is near
        template = " ".join(words(40, 0))
        texts = [f"{template} {' '.join(words(20, seed + 1))}" for seed in range(count)]
        started = time.process_time()
        assert near_twins(texts) == [-1] * count
        return time.process_time() - started

    # 8 times the texts: linear work takes 8 times as long, quadratic 64 times
    assert seconds(4000) < 24 * max(seconds(500), 0.02)
