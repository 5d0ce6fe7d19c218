"""PAR: the probability to beat a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_grpo.reward.base import RewardError, Scores
from gemma_grpo.reward.shaping import ReferenceRewards, chosen_replies, par
from gemma_grpo.types import Completion, Prompt, RolloutGroup

NUMBER = st.floats(-50, 50)
TABLE = st.integers(1, 4).flatmap(
    lambda n: st.tuples(
        st.lists(st.lists(st.one_of(st.none(), NUMBER), min_size=1, max_size=3), min_size=n, max_size=n),
        st.lists(NUMBER, min_size=n, max_size=n),
    )
)


def new_group(prompt_id: str, **columns: Any) -> RolloutGroup:
    prompt = Prompt(prompt_id, "test", ({"role": "user", "content": "x"},), (2, 5), "c", columns)
    return RolloutGroup(prompt, (Completion("y", (106,), (0.0,), "stop"),), 0)


def shaped(values: Scores, centres: Sequence[float]) -> Scores:
    return par(lambda groups: centres)(values, [new_group(str(n)) for n in range(len(values))])


def test_par_by_hand() -> None:
    # sigmoid(0) = 1/2, sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4
    ln3 = 1.0986122886681098
    assert shaped([[1.0, 1 + ln3, None], [-ln3]], [1.0, 0.0]) == [[0.5, pytest.approx(0.75), None], [pytest.approx(0.25)]]


@given(TABLE, st.floats(-20, 20))
def test_shifting_rewards_and_references_alike_changes_nothing(case: tuple[Scores, list[float]], shift: float) -> None:
    values, centres = case
    moved = shaped([[None if v is None else v + shift for v in row] for row in values], [c + shift for c in centres])
    for row, expected in zip(moved, shaped(values, centres), strict=True):
        assert row == [None if value is None else pytest.approx(value, abs=1e-9) for value in expected]


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_it_is_bounded_and_keeps_the_order(first: float, second: float, centre: float) -> None:
    ((low, high),) = shaped([[min(first, second), max(first, second)]], [centre])
    assert low is not None
    assert high is not None
    assert 0 <= low <= high <= 1


def test_beating_the_reference_by_much_more_gains_almost_nothing() -> None:
    ((some, much),) = shaped([[10.0, 1000.0]], [0.0])
    assert some is not None
    assert much is not None
    assert much - some < 1e-4


def test_a_reference_is_needed_for_each_group() -> None:
    with pytest.raises(RewardError, match="got 1 references for 2 groups"):
        shaped([[1.0], [2.0]], [0.0])


class LengthReward:
    """Scores a completion by its number of tokens, and remembers whose."""

    name = "length"

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        self.seen += [[completion.text for completion in group.completions] for group in groups]
        return [[None if "?" in c.text else float(len(c.token_ids)) for c in group.completions] for group in groups]


@pytest.fixture
def references() -> tuple[ReferenceRewards, LengthReward]:
    reward = LengthReward()
    encode: Callable[[str], list[int]] = lambda reply: [*map(ord, reply), 106]  # noqa: E731
    return ReferenceRewards(reward, chosen_replies(encode), mean=-7.0), reward


def test_the_reference_is_the_datasets_reply_where_there_is_one_and_the_mean_elsewhere(references: Any) -> None:
    find, _ = references
    groups = [new_group("a", chosen="four"), new_group("b"), new_group("c", chosen=None), new_group("d", chosen="to", other=1)]
    assert find.score(groups) == [[1.0]] * 4
    assert find(groups) == [5.0, -7.0, -7.0, 3.0]
    assert find(groups[::-1]) == [3.0, -7.0, -7.0, 5.0]


def test_a_reply_the_reward_does_not_score_falls_back_on_the_mean(references: Any) -> None:
    groups = [new_group("a", chosen="what?")]
    assert references[0].score(groups) == [[1.0]]
    assert references[0](groups) == [-7.0]


def test_the_reply_is_scored_beside_the_completions_of_its_prompt(references: Any) -> None:
    find, reward = references
    find.score([new_group("a", chosen="four"), new_group("b")])
    assert reward.seen == [["y", "four"], ["y"]]
    assert find.name == "length"


def test_nothing_is_remembered_of_what_was_scored_before(references: Any) -> None:
    # a resumed run has not scored it, and must find the same numbers
    find, reward = references
    find.score([new_group("a", chosen="four")])
    find.score([new_group("a", chosen="longer reply"), new_group("d", chosen="new")])
    assert reward.seen == [["y", "four"], ["y", "longer reply"], ["y", "new"]]
    assert find([new_group("a"), new_group("d")]) == [13.0, 4.0]
    assert find.score([]) == find([]) == []
    with pytest.raises(KeyError):
        find([new_group("a")])
