"""Every kind of bad reward stops the run with its exact words, or is skipped and counted: never a score that was not given."""

from __future__ import annotations

import re
from typing import Any

import pytest
from bad_rewards import HERE, KINDS, groups

from gemma_grpo.config import RewardFunctionSettings
from gemma_grpo.reward.base import RewardError, RewardStack, WeightedReward
from gemma_grpo.reward.functions import FunctionReward


def bad_reward(kind: str, *, alone: bool, **settings: Any) -> FunctionReward:
    timeout = KINDS[kind].timeout if alone else None
    return FunctionReward(KINDS[kind].function, kind, RewardFunctionSettings(timeout=timeout, **settings))


def assert_stops(kind: str, *, alone: bool) -> None:
    with pytest.raises(RewardError) as caught:
        bad_reward(kind, alone=alone).score(groups())
    assert re.fullmatch(rf"reward {re.escape(repr(kind))} {KINDS[kind].text}", str(caught.value), re.DOTALL), str(caught.value)


def assert_skips(kind: str, *, alone: bool) -> None:
    stack = RewardStack([WeightedReward(bad_reward(kind, alone=alone, on_failure="skip", max_skipped=1.0))])
    scores = stack.score(groups())
    flat = [score for row in scores.rewards for score in row]
    skipped = KINDS[kind].skipped
    # the second alone, or all of them
    assert flat == ([0.5, None, 0.25, 0.25, 0.25, 0.25] if skipped == 1 else [None] * 6)
    assert scores.skipped == {kind: skipped}
    (warning,) = scores.warnings
    assert warning.startswith(f"reward {kind!r} left {skipped} of 6 completions without a score ({skipped} "), warning
    assert ". The last: it " in warning


def test_there_are_enough_kinds() -> None:
    assert len(KINDS) == 79
    assert len(HERE) == 57


@pytest.mark.parametrize("kind", HERE)
def test_a_bad_reward_stops_the_run_with_its_exact_words(kind: str) -> None:
    assert_stops(kind, alone=False)


@pytest.mark.parametrize("kind", HERE)
def test_a_bad_reward_is_skipped_and_counted_where_that_is_asked_for(kind: str) -> None:
    assert_skips(kind, alone=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_reward_with_a_deadline_stops_the_run_with_its_exact_words(kind: str) -> None:
    assert_stops(kind, alone=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_reward_with_a_deadline_is_skipped_and_counted_where_that_is_asked_for(kind: str) -> None:
    assert_skips(kind, alone=True)
