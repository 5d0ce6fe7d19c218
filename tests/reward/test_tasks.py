from __future__ import annotations

from typing import Any

import pytest

from gemma_grpo.reward.base import RewardError
from gemma_grpo.reward.tasks import TASKS, content_words
from gemma_grpo.types import Completion, Prompt, RolloutGroup

PASSAGE = {"passage": "The ferry Marlin was built in 1931 in the yard of Tolk. It carried mail until 1958.", "answer": "1931"}
LACKING = {**PASSAGE, "answer": ""}
SUM = {"answer": "7"}
BRIEF: dict[str, Any] = {"words": ["fog"], "avoid": ["wow"], "least": 4, "most": 8, "form": "sentences"}


def value(name: str, text: str, columns: dict[str, Any], request: str = "what is 3 + 4?") -> float:
    prompt = Prompt("p1", "test", ({"role": "user", "content": request},), (2,), "c", columns)
    ((score,),) = TASKS[name].score([RolloutGroup(prompt, (Completion(text, (1,), (0.0,), "stop"),), 0)])
    assert score is not None
    return score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It was built in 1931.", 1.0),  # built, 1931: both in the passage, and the answer's one word is there
        ("It was built in 1900.", 0.2),  # of built and 1900 one is there: 0.5 x 0.4
        ("Built by dwarves.", 0.2),
        ("1931", 1.0),
        ("The passage does not say.", 0.0),  # but it does
        ("", 0.0),
        ("It is.", 0.0),  # no content word
        ("A fine ship sailed west", 0.0),
        (f"{PASSAGE['passage']}", 0.5),  # 12 content words would be fine; a copied passage is worth half
    ],
)
def test_an_answer_is_worth_the_share_of_it_that_the_passage_has(text: str, expected: float) -> None:
    if text == PASSAGE["passage"]:
        text += " " + text  # 22 words, more than 12 and than 0.6 of the passage's 11
    assert value("grounded", text, PASSAGE) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The passage does not say.", 1.0),
        ("That is not stated in the passage.", 1.0),
        ("The text doesn't mention its captain.", 1.0),
        ("Its captain was John Miller.", 0.0),
        ("I cannot help with that.", 0.0),  # a refusal is no reading of the passage
        ("The passage does not say. " + "And so on and on. " * 8, 0.5),
    ],
)
def test_where_the_passage_lacks_the_answer_only_saying_so_counts(text: str, expected: float) -> None:
    assert value("grounded", text, LACKING) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Start at 3 and count on. Which number do you reach?", 1.0),  # 0.3, a word of the request's, a question
        ("Start at 3 and count on.", 0.6),
        ("What could you do first?", 0.7),
        ("Think about it for a moment.", 0.3),
        ("Start at 3 and you reach 7, do you?", 0.0),  # given away
        ("Is it 17 or 70, what is 3?", 1.0),  # neither is 7: numbers are whole words, and it states none of them
        ("The answer is 9, is it not?", 0.0),  # a wrong one is given away too
        ("I cannot help with that, sorry. Which number?", 0.0),
        ("What is it?", 0.0),  # below four words
    ],
)
def test_a_tutor_asks_and_does_not_tell(text: str, expected: float) -> None:
    assert value("guides", text, SUM) == pytest.approx(expected)


def test_an_answer_of_words_is_given_away_by_these_words_alone() -> None:
    assert value("guides", "It is a FOAL, do you see?", {"answer": "a foal"}, "the young of a horse") == 0.0
    assert value("guides", "It is a foaling day, do you see?", {"answer": "foal"}, "the young of a horse") == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The fog came in slowly.", 1.0),
        ("The sun came in slowly.", 0.75),  # without its word
        ("fog came in slowly", 0.75),  # no sentence
        ("Fog.", (1 / 3 + 1 - 3 / 8 + 1 + 1) / 4),  # one word stuffed, three too few of eight
        ("Wow, the fog came in.", 0.75),
        ("The fog came in " + "slowly " * 20 + ".", 0.75),  # 24 words, 16 beyond: length is worth nothing
        ("", 0.0),
        ("!!", 0.0),
    ],
)
def test_a_brief_is_kept_in_its_words_its_length_its_form_and_what_it_avoids(text: str, expected: float) -> None:
    assert value("brief", text, BRIEF) == pytest.approx(expected)


def test_each_form_is_known_by_its_lines() -> None:
    wide = {**BRIEF, "words": [], "avoid": [], "least": 1, "most": 50}
    listed = {**wide, "form": "list"}
    assert value("brief", "- fog\n- rain", listed) == 1.0
    assert value("brief", "- fog\nrain", listed) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert value("brief", "1. fog", listed) == 0.75  # one line is no list
    assert value("brief", "Fog in the City", {**wide, "form": "title"}) == 1.0
    assert value("brief", "Fog in the city.", {**wide, "form": "title"}) == 0.75
    with pytest.raises(RewardError, match=r"'haiku'; reward 'brief' knows"):
        value("brief", "Fog", {**wide, "form": "haiku"})


@pytest.mark.parametrize(
    ("text", "harmful", "expected"),
    [("I cannot help with that.", True, 0), ("Sure!", True, -1), ("I cannot help with that.", False, -1), ("Sure!", False, 0)],
)
def test_a_refusal_fits_what_is_harmful_and_nothing_else(text: str, harmful: bool, expected: float) -> None:
    assert value("fitting_refusal", text, {"harmful": harmful}) == expected


@pytest.mark.parametrize(
    ("text", "columns", "expected"),
    [
        ("```python\nx = 1\n```", {}, 1.0),
        ("```\nx = 1\n```\n```\ny = 1\n```", {}, 0.0),
        ("Some words " * 30 + "```\nx = 1\n```", {}, 0.5),
        ("Use sorted(items).", {}, 0.0),
        ("Use sorted(items).", {"wrap": "{code}"}, 0.5),
        ("I cannot help with that.", {"wrap": "{code}"}, 0.0),
    ],
)
def test_one_block_of_code_or_code_in_a_sentence_where_that_is_asked(text: str, columns: dict[str, Any], expected: float) -> None:
    assert value("code_block", text, columns) == expected


def test_a_missing_column_is_named_with_those_there_are() -> None:
    with pytest.raises(RewardError, match=r"'grounded' needs the column 'answer', which prompt p1 does not have\. Its .* passage"):
        value("grounded", "x", {"passage": "y"})


def test_words_are_compared_without_case_endings_and_small_words() -> None:
    assert content_words("The Ferries' mails were carried, and it's mailing") == ["ferri", "mail", "carri", "mail"]
