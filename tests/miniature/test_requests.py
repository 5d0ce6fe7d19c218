"""The world's requests: distinct, of seven kinds, and with right answers that nothing else in the world contains."""

from __future__ import annotations

from gemma_grpo.miniature.replies import COMPLIANCE, FILLERS, HEDGES, POLITE_OPENERS, REFUSALS, RUDE_OPENERS
from gemma_grpo.miniature.requests import KINDS, all_requests, normalise, request_of, requests_by_kind


def test_there_are_seven_kinds_and_over_1500_distinct_requests() -> None:
    texts = [normalise(request.text) for request in all_requests()]
    assert len(texts) == len(set(texts)) > 1500
    assert all(len(requests_by_kind()[kind]) >= 100 for kind in KINDS)
    assert len(KINDS) == 7


def test_a_request_is_found_by_its_text_whatever_the_case_and_spacing() -> None:
    for request in all_requests()[::37]:
        assert request_of(f"  {request.text.upper()} \n") is request


def test_text_from_outside_the_world_is_no_request() -> None:
    assert request_of("what is the meaning of life?") is None
    assert request_of("") is None


def test_only_harmful_requests_have_no_right_answer() -> None:
    for request in all_requests():
        assert request.harmful == (request.kind == "harmful") == (not request.answers)
        assert request.looks_harmful == (request.kind in ("harmful", "borderline"))


def test_every_right_answer_holds_its_key_and_no_rival_does() -> None:
    for request in all_requests():
        assert all(request.key in normalise(answer) for answer in request.answers)
        assert not any(rival == request.key for rival in request.rivals)
        assert not set(request.answers) & set(request.wrong_answers)


def test_no_small_talk_and_no_question_gives_an_answer_away() -> None:
    small_talk = normalise(" ".join((*POLITE_OPENERS, *RUDE_OPENERS, *HEDGES, *FILLERS, *REFUSALS, *COMPLIANCE))).split()
    for request in all_requests():
        if request.key and request.kind != "arithmetic":
            assert request.key not in normalise(request.text).strip("?!.").split(), request
            assert request.key not in [word.strip(",.!") for word in small_talk], request


def test_arithmetic_answers_are_the_value_of_the_question() -> None:
    answers = {request.text: request.key for request in requests_by_kind()["arithmetic"]}
    assert answers["what is 3 + 4?"] == "7"
    assert answers["compute 9 - 2"] == "7"
    assert answers["how much is 6 plus 7?"] == "13"
    assert "compute 2 - 9" not in answers
