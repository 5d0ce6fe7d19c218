"""Figures of a pair scorer, each worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma_grpo.reward.quality import (
    accuracy,
    agreement,
    calibration,
    leakage,
    leakage_warning,
    quality_report,
    spearman,
    within_group_length_correlation,
)
from gemma_grpo.shares import wilson_interval
from gemma_grpo.types import Completion, PreferencePair, Prompt, RolloutGroup


def logit(p: float) -> float:
    return math.log(p / (1 - p))


@pytest.mark.parametrize(
    ("successes", "n", "interval"),
    [
        # centre (p + z^2/2n) / (1 + z^2/n), half-width z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n), with z = 1.96
        (0, 10, (0.0, 3.8416 / 13.8416)),  # p = 0: centre and half-width are both z^2/2n / (1 + z^2/n)
        (10, 10, (10 / 13.8416, 1.0)),
        (5, 10, (0.5 - 1.96 * math.sqrt(0.025 + 0.009604) / 1.38416, 0.5 + 1.96 * math.sqrt(0.025 + 0.009604) / 1.38416)),
        (81, 263, (0.2553, 0.3662)),  # Newcombe 1998, table I: "Wilson score, without continuity correction"
        (15, 148, (0.0624, 0.1605)),
        (0, 0, (0.0, 1.0)),
    ],
)
def test_wilsons_interval_by_hand(successes: float, n: int, interval: tuple[float, float]) -> None:
    assert wilson_interval(float(successes), n) == pytest.approx(interval, abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, 2 * n), st.just(n))))
def test_wilsons_interval_holds_the_share_stays_in_the_unit_interval_and_mirrors(case: tuple[int, int]) -> None:
    successes, n = case[0] / 2, case[1]
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n + 1e-12
    assert successes / n - 1e-12 <= high <= 1
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low))


def test_a_tie_is_half_right() -> None:
    measured = accuracy(torch.tensor([1.0, 2.0, 0.0, -1.0]))
    assert (measured["value"], measured["n"]) == (2.5 / 4, 4)
    assert measured["interval"] == list(wilson_interval(2.5, 4))


def test_no_pair_has_no_accuracy() -> None:
    assert accuracy(torch.zeros(0)) == {"value": None, "interval": [0.0, 1.0], "n": 0}


def test_calibration_bins_by_hand() -> None:
    # five bins of stated probability: .5-.6 .6-.7 .7-.8 .8-.9 .9-1; a negative margin states as much for the other side
    margins = torch.tensor([logit(0.55), -logit(0.55), logit(0.75), logit(0.75), logit(0.75), -logit(0.75), logit(0.95)])
    bins, error = calibration(margins)
    assert [bin_["n"] for bin_ in bins] == [2, 4, 1]
    assert [bin_["predicted"] for bin_ in bins] == pytest.approx([0.55, 0.75, 0.95])
    assert [bin_["observed"] for bin_ in bins] == pytest.approx([0.5, 0.75, 1.0])
    assert error == pytest.approx((2 * 0.05 + 4 * 0 + 1 * 0.05) / 7, rel=1e-5)


def test_calibration_at_its_ends() -> None:
    bins, error = calibration(torch.tensor([0.0, 100.0]))
    assert bins == [{"predicted": 0.5, "observed": 0.5, "n": 1}, {"predicted": 1.0, "observed": 1.0, "n": 1}]
    assert error == 0
    assert calibration(torch.zeros(0)) == ([], None)


def test_a_scorer_that_is_sure_and_wrong_has_the_largest_error() -> None:
    _, error = calibration(torch.tensor([-100.0, -100.0]))
    assert error == 1


def pair(chosen_words: int, rejected_words: int, source: str = "a", **columns: str) -> PreferencePair:
    return PreferencePair("id", source, ({"role": "user", "content": "x"},), "w " * chosen_words, "w " * rejected_words, columns)


PAIRS = [pair(9, 1), pair(3, 3, "b"), pair(1, 5), pair(2, 4, "b"), pair(8, 1), pair(1, 2, "b"), pair(7, 1), pair(1, 9)]
SCORES = torch.tensor([[2.0, 0], [2, 1], [1, 0], [0, 0], [0, 3], [1, 0], [5, 0], [0, 1]])
ZERO_SHOT = torch.tensor([[1.0, 0]] * 6 + [[0, 1]] * 2)


def test_the_report_by_hand() -> None:
    report = quality_report(PAIRS, SCORES, ZERO_SHOT)
    assert report["pairs_held_out"] == 8
    assert report["accuracy"]["value"] == 5.5 / 8  # right: 0 1 2 5 6, a tie: 3
    assert report["accuracy_zero_shot"]["value"] == 6 / 8
    assert report["longer_wins"] == accuracy(torch.tensor([1.0, 0, -1, -1, 1, -1, 1, -1]))  # chosen longer: 0 4 6, equal: 1
    assert report["longer_wins"]["value"] == 3.5 / 8
    # the two of eight pairs closest in length: 1 (same length) and 5 (one word), both right
    assert (report["closest_length_quarter"]["value"], report["closest_length_quarter"]["n"]) == (1.0, 2)
    assert {source: part["n"] for source, part in report["by_source"].items()} == {"a": 5, "b": 3}
    assert report["by_source"]["a"]["value"] == 3 / 5
    assert report["by_source"]["b"]["value"] == 2.5 / 3
    assert report["by_kind"] == {}
    assert sum(bin_["n"] for bin_ in report["calibration"]) == 8


def test_the_quarter_is_rounded_up() -> None:
    for count, quarter in ((1, 1), (4, 1), (5, 2), (8, 2)):
        report = quality_report(PAIRS[:count], SCORES[:count], ZERO_SHOT[:count])
        assert report["closest_length_quarter"]["n"] == quarter


def test_kinds_are_told_apart_where_every_pair_has_one() -> None:
    pairs = [pair(1, 2, kind="how-to"), pair(1, 2, kind="greeting"), pair(1, 2, kind="greeting")]
    report = quality_report(pairs, torch.tensor([[1.0, 0], [1, 0], [0, 1]]), torch.zeros(3, 2))
    assert {kind: (part["value"], part["n"]) for kind, part in report["by_kind"].items()} == {"greeting": (0.5, 2), "how-to": (1, 1)}
    assert quality_report([*pairs, pair(1, 2)], torch.zeros(4, 2), torch.zeros(4, 2))["by_kind"] == {}


def test_no_held_out_pair_gives_an_empty_report_not_an_error() -> None:
    report = quality_report([], torch.zeros(0, 2), torch.zeros(0, 2))
    assert report["accuracy"] == {"value": None, "interval": [0.0, 1.0], "n": 0}
    assert (report["calibration"], report["expected_calibration_error"], report["by_source"]) == ([], None, {})


def talk(*turns: str, chosen: str = "yes", rejected: str = "no") -> PreferencePair:
    """A pair after so many turns, the person's first."""
    messages = tuple({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns))
    return PreferencePair(" ".join(turns), "a", messages, chosen, rejected)  # type: ignore[arg-type]


def test_depths_and_conversations_met_once_have_accuracies_of_their_own() -> None:
    pairs = [talk("q1"), talk("q1", "yes", "more?"), talk("q2"), talk("q3", "a", "b", "c", "d"), talk(*"123456789")]
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    report = quality_report(pairs, scores, torch.zeros(5, 2))
    assert {depth: (one["value"], one["n"]) for depth, one in report["by_depth"].items()} == {
        "1": (0.5, 2), "2": (0.0, 1), "3": (1.0, 1), "4+": (1.0, 1)
    }  # fmt: skip
    # q1 is there at two depths: left are q2 (wrong), q3 and the long one (right)
    assert (report["without_sibling"]["value"], report["without_sibling"]["n"]) == (2 / 3, 3)


def test_rank_correlations_by_hand() -> None:
    assert spearman([1.0, 2.0, 3.0], [10.0, 20.0, 90.0]) == pytest.approx(1.0)
    assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    # ranks 1 2 3 4 and 2 1 4 3: 1 - 6 x (1 + 1 + 1 + 1) / (4 x 15) = 0.6
    assert spearman([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]) == pytest.approx(0.6)
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert spearman([1.0, 2.0], [1.0, 2.0]) is None


def test_length_within_groups_is_seen_where_lengths_of_prompts_would_hide_it() -> None:
    def group(source: str, *lengths: int) -> RolloutGroup:
        prompt = Prompt(source, source, (), (2,), source)
        return RolloutGroup(prompt, tuple(Completion("x", (7,) * n, (-1.0,) * n, "stop") for n in lengths), 0)

    # within each group the longer is worth more; of one group to the other it is the other way round
    groups = [group("a", 1, 2, 3), group("a", 11, 12, 13), group("b", 1, 2, 3)]
    scores = [[5.0, 6.0, 7.0], [1.0, 2.0, 3.0], [1.0, None, 1.0]]
    assert within_group_length_correlation(groups, scores) == {"a": {"value": pytest.approx(1.0), "n": 2}}


def test_members_agree_where_all_that_scored_prefer_the_same() -> None:
    one, other = [[1.0, 0.0], [1.0, 0.0], [None, None]], [[2.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
    # the third pair was scored by one of them alone: nobody to agree with
    assert (agreement([one, other])["value"], agreement([one, other])["n"]) == (1 / 2, 2)


def test_leaks_are_conversations_on_both_sides_and_replies_that_training_goes_on_with() -> None:
    train = [talk("q1", "yes, gladly", "and then?"), talk("q9")]
    held_out = [talk("q2", chosen="yes, gladly"), talk("q9", chosen="other"), talk("q3")]
    found = leakage(train, held_out)
    assert found == {"n": 3, "conversations_in_training": 1, "replies_in_training_contexts": 1}
    warning = leakage_warning({"accuracy": {"value": 0.9}, "leakage": found})
    assert warning is not None
    assert "right on 90.0% of held-out pairs" in warning
    assert leakage_warning({"accuracy": {"value": 0.9}, "leakage": leakage(train, [talk("q2")])}) is None
    assert leakage_warning({"accuracy": {"value": 0.7}}) is None
