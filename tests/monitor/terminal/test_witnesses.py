"""Laws of the few numbers of a look that are shown: for better or for worse, compared with the first look, zero without a sign."""

from __future__ import annotations

from typing import Any

from gemma_grpo.monitor.terminal.witnesses import Reading, readings


def look(**metrics: Any) -> dict[str, Any]:
    return {"step": 3, "metrics": metrics}


def test_a_change_is_for_the_better_or_the_worse_by_what_is_wanted() -> None:
    first, last = (
        look(witness=0.5, strayed=0.1, refusal_benign=0.3, kl_sequence=0.5),
        look(witness=0.4, strayed=0.2, refusal_benign=0.2, kl_sequence=1.25),
    )
    assert readings(first, last) == [
        Reading("held-out judge", "0.400", "-0.100", -1),
        Reading("strayed", "20%", "+10", -1),
        Reading("KL per reply", "1.25", "+0.75", 0),
        Reading("refuses benign", "20%", "-10", 1),
    ]


def test_the_first_look_has_changed_from_nothing() -> None:
    first = look(gold=0.25)
    assert readings(first, first) == [Reading("gold", "0.250", "", 0)]
    assert readings(None, None) == []


def test_what_the_first_look_did_not_have_is_shown_without_a_change() -> None:
    assert readings(look(), look(gold=0.25)) == [Reading("gold", "0.250", "", 0)]


def test_a_zero_has_no_sign_and_no_tone() -> None:
    assert readings(look(kl_sequence=0.003, witness=0.5), look(kl_sequence=-0.001, witness=0.4999)) == [
        Reading("held-out judge", "0.500", "+0.000", 0),
        Reading("KL per reply", "0.00", "+0.00", 0),
    ]


def test_what_is_no_number_is_left_out() -> None:
    assert readings(look(), look(gold="high", witness=None, strayed=float("nan"))) == []
