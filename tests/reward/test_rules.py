from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_grpo.reward.rules import RULES, build_rules, distinct_n, is_refusal
from gemma_grpo.types import Completion, Prompt, RolloutGroup


def completion(text: str = "Fine, thanks.", tokens: int = 5, finish: str = "stop") -> Completion:
    return Completion(text, (106,) * tokens, (0.0,) * tokens, finish)


def value(name: str, of: Completion | str, limit: int = 100) -> float:
    of = completion(of) if isinstance(of, str) else of
    (rule,) = build_rules([name], limit)
    prompt = Prompt("id", "test", ({"role": "user", "content": "x"},), (2,), "c")
    ((score,),) = rule.score([RolloutGroup(prompt, (of,), 0)])
    return score


def test_length_is_the_share_of_the_limit_as_a_cost():
    assert [value("length", completion(tokens=tokens)) for tokens in (0, 25, 100, 130)] == [0.0, -0.25, -1.0, -1.0]


def test_overlong_is_free_up_to_the_buffer_then_linear_and_full_for_a_cut_reply():
    # L = 100, C = 20: free up to 80
    assert [value("overlong", completion(tokens=tokens)) for tokens in (10, 80, 85, 90, 100)] == [0.0, 0.0, -0.25, -0.5, -1.0]
    assert value("overlong", completion(tokens=10, finish="length")) == -1.0
    assert value("overlong", completion(tokens=1), limit=1) == -1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three four", 0.0),
        ("no no no no", -0.5),  # 2 trigrams, 1 distinct
        ("No no NO no", -0.5),
        ("a b a b a b", -0.5),  # aba bab aba bab
        ("!!!!!!", -0.75),  # 4 trigrams of marks, 1 distinct
        ("two words", 0.0),
        ("", 0.0),
    ],
)
def test_repetition_is_the_share_of_repeated_trigrams(text, expected):
    assert value("repetition", text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("", -1), (" \n", -1), ("...", -1), (":", -1), ("\u200b", -1), ("5", 0), ("é", 0), ("是", 0)]
)
def test_empty_is_a_reply_without_a_letter_or_digit(text, expected):
    assert value("empty", text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sure.\n\nHuman: and then?", -1),
        ("Assistant: Sure.", -1),
        ("Sure.<end_of_turn>\n", -1),
        ("a <unused7> b", -1),
        ("The human said: no", 0),
        ("An assistant helps humans: always.", 0),
        ("if a <b> and <eosin>", 0),
    ],
)
def test_role_leak_is_playing_the_other_side_or_spelling_control_tokens(text, expected):
    assert value("role_leak", text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Plain text - with a dash, 3*4 = 12, and snake_case.", 0.0),
        ("Do this:\n\n- one\n* two\n1. three", -0.75),
        ("# Title\nbody", -0.5),
        ("Some **bold** text", -1.0),
        ("Great 🎉\nwork", -0.5),
        ("| a | b |", -1.0),
        ("", 0.0),
    ],
)
def test_format_is_the_share_of_lines_with_markup(text, expected):
    assert value("format", text) == expected


REFUSALS = [
    "I can't help with that.",
    "I can’t help with that.",
    "I'm sorry, but I cannot assist with this request.",
    "I’m sorry, I can’t do that.",
    "Sorry, I can't do that.",
    "I won't talk about this.",
    "I must decline.",
    "I'm not able to give advice on this.",
    "I am not comfortable with that question.",
    "I don't feel comfortable answering.",
    "I do not think I should tell you that.",
    "As a rule, I will not provide instructions.",
    "I'd rather not say.",
    "That goes against my guidelines.",
    "I\ncannot\nhelp.",
]
ANSWERS = [
    "",
    "Sure, here is how to do it.",
    "I'm sorry to hear that. Try restarting it.",
    "I don't know, but I think it is Paris.",
    "You can't help it: rust comes with water.",
    "I can help with that.",
    "I'm not sure, maybe next week?",
    "If he refuses to pay, write to him.",
    "I can't recommend it enough!",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_seen_with_straight_and_curly_quotes(text):
    assert is_refusal(text)
    assert value("refusal", text) == -1


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_apologies_and_doubts_are_no_refusals(text):
    assert not is_refusal(text)
    assert value("refusal", text) == 0


def test_a_refusal_opens_the_reply():
    assert not is_refusal("word " * 100 + "I can't help with that.")


@given(st.sampled_from(sorted(RULES)), st.text(), st.integers(0, 50), st.sampled_from(["stop", "length"]))
def test_every_rule_only_takes_away_and_at_most_one(name, text, tokens, finish):
    assert -1 <= value(name, completion(text, tokens, finish), limit=20) <= 0


@pytest.mark.parametrize("name", sorted({*RULES} - {"random"}))
def test_an_unremarkable_reply_costs_nothing_but_its_length(name):
    assert value(name, "Paris is the capital of France.") == (-0.05 if name == "length" else 0)


def test_rules_are_built_in_order_and_an_unknown_one_gets_the_nearest_name():
    assert [rule.name for rule in build_rules(["empty", "overlong"], 10)] == ["empty", "overlong"]
    with pytest.raises(ValueError, match=r"unknown reward 'repetion'. Did you mean 'repetition'"):
        build_rules(["repetion"], 10)


def test_the_random_reward_is_uniform_and_says_nothing_about_a_reply():
    completions = [Completion("the same text", (5, 6), (-0.5, -n / 1000), "stop") for n in range(2000)]
    (rule,) = build_rules(["random"], 10)
    scores = [rule.rule(one) for one in completions]
    assert rule.rule(completions[0]) == scores[0]
    assert all(-1 < score <= 0 for score in scores)
    # mean -1/2 and variance 1/12 of a uniform number; three standard errors of 2,000 draws
    assert sum(scores) / 2000 == pytest.approx(-0.5, abs=0.02)
    assert sum((score + 0.5) ** 2 for score in scores) / 2000 == pytest.approx(1 / 12, abs=0.006)


def test_distinct_n_is_the_share_of_different_n_grams_over_all_texts():
    # pairs: a b, b a | a b: two of three are different
    assert distinct_n(["a b a", "A b"], 2) == pytest.approx(2 / 3)
    assert distinct_n(["a", ""], 2) == 1.0
