"""What an evaluation is said to show, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from gemma_grpo.monitor.findings import STYLES, compared, kind_rows, measure, show, show_interval, verdict


def metric(before: float, after: float, low: float | None, high: float | None, n: int = 128) -> dict[str, Any]:
    interval = None if low is None else [low, high]
    return {"before": before, "after": after, "gain": after - before, "interval": interval, "n": n}


def test_the_verdict_leads_with_gold_and_its_interval() -> None:
    found = verdict({"gold": metric(0.38, 0.61, 0.19, 0.27), "reward": metric(0.1, 0.9, 0.7, 0.9)})
    assert found is not None
    assert (found.tone, found.headline) == ("good", "Better.")
    assert found.sentence == "Gold 0.38 → 0.61, gain 0.23 [0.19, 0.27] on n = 128 held-out replies."


@pytest.mark.parametrize(
    ("low", "high", "tone"), [(-0.3, -0.1, "bad"), (-0.1, 0.2, "unclear"), (0.0, 0.2, "unclear"), (None, None, "unclear")]
)
def test_the_tone_follows_the_interval_not_the_gain(low: float | None, high: float | None, tone: str) -> None:
    found = verdict({"gold": metric(0.3, 0.4, low, high)})
    assert found is not None
    assert found.tone == tone
    assert ("too few conversations" in found.sentence) == (low is None)


def test_without_gold_a_rising_reward_is_not_called_better() -> None:
    found = verdict({"reward": metric(0.1, 0.9, 0.7, 0.9)})
    assert found is not None
    assert (found.tone, found.headline) == ("unclear", "The reward rose.")
    assert "proves no better replies" in found.further[0]
    assert verdict({}) is None


def test_without_gold_the_witness_speaks_and_is_not_taken_for_the_truth() -> None:
    for low, high, tone, headline in ((0.1, 0.3, "unclear", "The held-out judge rose."), (-0.3, -0.1, "bad", "The held-out judge fell."),
                                      (-0.1, 0.1, "unclear", "No clear change.")):  # fmt: skip
        found = verdict({"reward": metric(0.1, 0.9, 0.7, 0.9), "witness": metric(0.0, 0.2, low, high)})
        assert found is not None
        assert (found.tone, found.headline) == (tone, headline)
        assert "can err with it" in found.further[0]


def test_the_verdict_is_about_the_metric_that_was_named_before_the_run() -> None:
    gold, win = metric(0.3, 0.4, 0.05, 0.15), metric(0.5, 0.4, -0.15, -0.05)
    found = verdict({"primary": "win_rate", "gold": gold, "win_rate": win | {"judge": "gold"}})
    assert found is not None
    assert (found.tone, found.headline) == ("bad", "Worse.")
    assert found.sentence.startswith("Win rate 50")
    # a win rate that a judge gives who can be fooled is not the truth
    for judge, tone in (("witness", "unclear"), ("reward", "unclear"), ("gold", "good")):
        found = verdict({"primary": "win_rate", "win_rate": metric(0.5, 0.7, 0.1, 0.3) | {"judge": judge}})
        assert found is not None
        assert found.tone == tone
    refusals = verdict({"primary": "refusal_benign", "reward": gold, "refusal_benign": metric(0.1, 0.3, 0.1, 0.3)})
    assert refusals is not None
    assert (refusals.tone, refusals.headline) == ("bad", "Refusals changed for the worse.")
    missing = verdict({"primary": "win_rate_chosen", "gold": gold})
    assert missing is not None
    assert missing.headline == "Better."
    assert missing.warnings[0] == "win rate, dataset, by which this run was to be judged, was not measured."


def test_win_rates_are_told_at_equal_length_too() -> None:
    controlled = {"value": 0.6, "interval": [0.55, 0.65], "length_effect": 1.0}
    win = {**metric(0.5, 0.71, 0.16, 0.26), "judge": "gold", "length_controlled": controlled}
    over = {**metric(0.4, 0.6, 0.1, 0.3), "length_controlled": {"value": 0.5, "interval": None, "length_effect": 0.0}}
    found = verdict({"gold": metric(0.3, 0.4, 0.05, 0.15), "win_rate": win, "win_rate_chosen": over})
    assert found is not None
    lines = [line.replace("\u00a0", " ") for line in found.further]
    assert lines[0] == "Against the untouched model it wins 71 % [66 %, 76 %], judged by gold; at equal length 60 % [55 %, 65 %]."
    assert lines[1] == "Against the dataset’s preferred reply it wins 40 % → 60 %; at equal length 50 %."


def test_several_policies_stand_in_one_row_and_what_one_lacks_is_empty() -> None:
    equal = {"length_controlled": {"value": 0.55, "interval": [0.5, 0.6]}}
    run = {"gold": metric(0.3, 0.6, 0.2, 0.4), "win_rate": metric(0.5, 0.7, 0.1, 0.3) | equal}
    rows = compared([run, {"gold": metric(0.3, 0.4, 0.0, 0.2)}])
    assert [(row.title, row.cells) for row in rows] == [
        ("gold", [("0.60", "(+0.30 [0.20, 0.40])"), ("0.40", "(+0.10 [0.00, 0.20])")]),
        ("win rate", [("70\u00a0%", "(+20\u00a0pt [10, 30]\u00a0pt)"), None]),
        ("win rate, equal length", [("55\u00a0%", "[50\u00a0%, 60\u00a0%]"), None]),
    ]
    assert compared([{}, {}]) == []


def test_the_win_rate_interval_is_shown_around_the_win_rate() -> None:
    win = {**metric(0.5, 0.71, 0.16, 0.26), "judge": "gold"}
    found = verdict({"gold": metric(0.3, 0.4, 0.05, 0.15), "win_rate": win})
    assert found is not None
    assert found.further[0].replace("\u00a0", " ") == "Against the untouched model it wins 71 % [66 %, 76 %], judged by gold."


def test_a_kind_where_reward_rises_and_gold_falls_comes_first_and_is_warned_of() -> None:
    evaluation = {
        "gold": metric(0.3, 0.5, 0.1, 0.3),
        "by_kind": {
            "greeting": {"gold": metric(0.3, 0.7, 0.3, 0.5), "reward": metric(0, 1, 0.8, 1.2), "n": 9},
            "code": {"gold": metric(0.6, 0.3, -0.4, -0.2), "reward": metric(0, 1, 0.8, 1.2), "n": 8},
            "arithmetic": {"gold": metric(0.3, 0.2, -0.3, 0.1), "reward": metric(1, 0, -1.2, -0.8), "n": 7},
        },
    }
    rows = kind_rows(evaluation)
    assert [row.kind for row in rows] == ["code", "arithmetic", "greeting"]
    assert [row.mark for row in rows] == ["reward up, gold down: the reward is wrong here", "gold and reward fell (within chance)", ""]
    found = verdict(evaluation)
    assert found is not None
    assert found.warnings == ["Look at “code”: the reward rose while gold fell, gold -0.30, reward +1.00 on n = 8."]


def test_more_refusals_of_benign_requests_are_warned_of_only_beyond_chance() -> None:
    base = {"gold": metric(0.3, 0.5, 0.1, 0.3)}
    sure = verdict({**base, "refusal_benign": metric(0.1, 0.3, 0.1, 0.3)})
    chance = verdict({**base, "refusal_benign": metric(0.1, 0.3, -0.1, 0.5)})
    assert sure is not None
    assert chance is not None
    assert len(sure.warnings) == 1
    assert chance.warnings == []


def test_numbers_are_written_with_their_unit_and_never_as_minus_zero() -> None:
    assert show(0.714, STYLES["win_rate"]) == "71\u00a0%"
    assert show(0.214, STYLES["win_rate"], signed=True) == "+21\u00a0pt"
    assert show(-0.0001, STYLES["gold"]) == "0.00"
    assert show(None, STYLES["gold"]) == "–"
    one = measure(metric(0.5, 0.6, 0.05, 0.15))
    assert one is not None
    assert show_interval(one, STYLES["win_rate"]) == "[5, 15]\u00a0pt"


@pytest.mark.parametrize(
    "data", [None, 3, [], {}, {"before": None, "after": None, "gain": None, "interval": None, "n": 0}, {"before": "x"}]
)
def test_what_is_no_metric_is_none(data: Any) -> None:
    assert measure(data) is None
