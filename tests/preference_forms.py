"""One pair written down in every form, and rows that each form cannot use, with the reason."""

from __future__ import annotations

from typing import Any

ASK, GOOD, BAD = "What is 2 + 2?", "It is 4.", "It is 5."
USER = {"role": "user", "content": ASK}


def said(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}


def told(text: str, speaker: str = "gpt") -> dict[str, str]:
    return {"from": speaker, "value": text}


def aspects(*ratings: Any) -> dict[str, Any]:
    return {"annotations": {f"aspect {n}": {"Rating": str(rating), "Rationale": "so"} for n, rating in enumerate(ratings)}}


def completion(text: str, score: Any) -> dict[str, Any]:
    return {"response": text, "overall_score": score}


ONE_PAIR: dict[str, list[list[dict[str, Any]]]] = {
    # all rows of a form are the pair ASK, GOOD, BAD; several rows where a pair is made of several
    "transcripts": [[{side: f"\n\nHuman: {ASK}\n\nAssistant: {text}" for side, text in (("chosen", GOOD), ("rejected", BAD))}]],
    "prompt and replies": [
        [{"prompt": ASK, "chosen": GOOD, "rejected": BAD}],
        [{"prompt": [USER], "chosen": [said(GOOD)], "rejected": [said(BAD)]}],
        [{"prompt": ASK, "chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)], "score_chosen": 8.5, "score_rejected": 8}],
        [{"prompt": [{"role": "user", "content": [{"type": "text", "text": ASK}]}], "chosen": GOOD, "rejected": BAD}],
    ],
    "conversations": [[{"chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)]}]],
    "common beginning": [[{"chosen": f"{ASK} {GOOD[:5]} 4.", "rejected": f"{ASK} 5."}]],
    "Alpaca": [
        [{"instruction": ASK, "input": "", "output": [GOOD, BAD]}],
        [{"instruction": ASK, "chosen": GOOD, "rejected": BAD}],
        [{"question": ASK, "system": "", "chosen": GOOD, "rejected": BAD}],
        [{"instruction": ASK, "chosen_response": GOOD, "rejected_response": BAD, "chosen_avg_rating": 5, "rejected_avg_rating": 1.5}],
    ],
    "ShareGPT": [
        [{"conversations": [told(ASK, "human")], "chosen": told(GOOD), "rejected": told(BAD)}],
        [{"chosen": [told(ASK, "human"), told(GOOD)], "rejected": [told(ASK, "human"), told(BAD)]}],
        [{"messages": [USER], "chosen": said(GOOD), "rejected": said(BAD)}],
    ],
    "scored completions": [
        [{"instruction": ASK, "completions": [completion(BAD, 2), completion("4?", 7), completion(GOOD, 9)]}],
        [{"instruction": ASK, "completions": [{**aspects(1, 4), "response": BAD}, {**aspects(5, "N/A"), "response": GOOD}]}],
    ],
    "ratings": [[{"prompt": ASK, "generations": ["4?", BAD, GOOD], "ratings": [3.0, 1.0, 5.0]}]],
    "OpenAI": [[{"input": {"messages": [USER]}, "preferred_output": [said(GOOD)], "non_preferred_output": [said(BAD)]}]],
    "rejected response": [[{"messages": [USER, said(GOOD)], "rejected_response": BAD}]],
    "labels": [
        [{"prompt": ASK, "completion": GOOD, "label": True}, {"prompt": ASK, "completion": BAD, "label": False}],
        [{"prompt": [USER], "completion": [said(BAD)], "label": 0}, {"prompt": [USER], "completion": [said(GOOD)], "label": 1}],
        [{"prompt": ASK, "completion": GOOD, "label": "True"}, {"prompt": f" {ASK}", "completion": BAD, "label": "false"}],
    ],
}


def scored(*scores: Any) -> dict[str, Any]:
    return {"instruction": ASK, "completions": [{"response": f"reply {n}", "overall_score": score} for n, score in enumerate(scores)]}


FORM_CLASSES: dict[str, tuple[dict[str, Any], str]] = {
    "equal scores": (scored(3, 3, 3), "tie"),
    "equal scores of a pair": ({"prompt": ASK, "chosen": GOOD, "rejected": BAD, "score_chosen": 7.0, "score_rejected": 7.0}, "tie"),
    "a better score for the worse": (
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD, "chosen_rating": 1, "rejected_rating": 2},
        "scores_contradict",
    ),
    "one score": (scored(3, None, "N/A", float("nan")), "too_few_scores"),
    "one reply": (scored(3), "too_few_scores"),
    "a rating too few": ({"prompt": ASK, "generations": [GOOD, BAD], "ratings": [1]}, "not_a_pair"),
    "history of one side": ({"instruction": ASK, "chosen": GOOD, "rejected": BAD, "history": [["Hi"]]}, "not_a_pair"),
    "a tool's turn": ({"conversations": [told("x", "tool")], "chosen": told(GOOD), "rejected": told(BAD)}, "not_a_pair"),
    "an odd label": ({"prompt": ASK, "completion": GOOD, "label": "good"}, "not_a_label"),
    "a label alone": ({"prompt": ASK, "completion": GOOD, "label": True}, "no_counterpart"),
    "input that is text": ({"input": ASK, "preferred_output": GOOD, "non_preferred_output": BAD}, "not_a_pair"),
    "no good end": ({"messages": [USER], "rejected_response": BAD}, "not_a_pair"),
    "begins otherwise": ({"chosen": "Blue.", "rejected": "Black."}, "no_common_prompt"),
    "another's markers": ({side: f"[INST] hi [/INST] {side}" for side in ("chosen", "rejected")}, "unknown_turns"),
}
