from __future__ import annotations

import asyncio
import functools

import numpy as np
import pytest

from gemma_grpo.reward.base import RewardError
from gemma_grpo.reward.functions import FunctionReward
from gemma_grpo.types import Completion, Prompt, RolloutGroup

MESSAGES = ({"role": "user", "content": "2+2?"},)


def group(*texts: str, **columns) -> RolloutGroup:
    prompt = Prompt("id", "test", MESSAGES, (2,), "c", columns)
    return RolloutGroup(prompt, tuple(Completion(text, (*range(len(text)), 106), (0.0,) * (len(text) + 1), "stop") for text in texts), 0)


GROUPS = [group("a", "bb", answer="4"), group("ccc", "", answer="5", topic="sums")]


def text_length(completions, **kwargs):
    return [len(completion[0]["content"]) for completion in completions]


def test_scores_come_back_in_the_groups_they_were_asked_for():
    assert FunctionReward(text_length).score(GROUPS) == [[1.0, 2.0], [3.0, 0.0]]


def test_the_function_gets_trls_arguments_and_every_column_as_lists():
    seen = {}

    def spy(**kwargs):
        seen.update(kwargs)
        return [0.0] * 4

    FunctionReward(spy).score(GROUPS)
    assert seen == {
        "prompts": [[{"role": "user", "content": "2+2?"}]] * 4,
        "completions": [[{"role": "assistant", "content": text}] for text in ("a", "bb", "ccc", "")],
        "completion_ids": [[0, 106], [0, 1, 106], [0, 1, 2, 106], [106]],
        "answer": ["4", "4", "5", "5"],
        "topic": [None, None, "sums", "sums"],
    }


def test_a_function_without_kwargs_gets_what_it_names():
    def correct(completions, answer, strict=False):
        return [float(completion[0]["content"] == expected) for completion, expected in zip(completions, answer, strict=True)]

    assert FunctionReward(correct).score([group("4", "5", answer="4", other=1)]) == [[1.0, 0.0]]


def test_an_argument_the_dataset_lacks_is_named_with_the_columns_there_are():
    def needs(completions, source, **kwargs):
        return []

    with pytest.raises(RewardError, match=r"'needs' needs 'source', which the dataset does not have. Its columns are: answer, topic"):
        FunctionReward(needs).score(GROUPS)


def test_none_means_not_scored():
    assert FunctionReward(lambda completions, **_: [1, None], "half").score(GROUPS[:1]) == [[1.0, None]]


def test_an_async_function_is_awaited():
    async def later(completions, **kwargs):
        values = await asyncio.gather(*(asyncio.sleep(0, len(completion[0]["content"])) for completion in completions))
        return list(values)

    assert FunctionReward(later).score(GROUPS) == [[1.0, 2.0], [3.0, 0.0]]


def test_an_async_function_works_inside_a_running_loop_as_in_a_notebook():
    async def later(completions, **kwargs):
        await asyncio.sleep(0)
        return [2.0] * len(completions)

    async def notebook():
        return FunctionReward(later).score(GROUPS[:1])

    assert asyncio.run(notebook()) == [[2.0, 2.0]]


def test_callable_objects_and_partials_are_rewards_too():
    class Judge:
        def __call__(self, completions, **kwargs):
            return np.ones(len(completions))

    def scaled(completions, scale, **kwargs):
        return [scale] * len(completions)

    assert FunctionReward(Judge()).score(GROUPS[:1]) == [[1.0, 1.0]]
    assert FunctionReward(functools.partial(scaled, scale=3), "scaled").score(GROUPS[:1]) == [[3.0, 3.0]]


def test_the_name_is_given_or_the_functions_own():
    assert FunctionReward(text_length).name == "text_length"
    assert FunctionReward(text_length, "mine").name == "mine"
    assert FunctionReward(functools.partial(text_length)).name == "partial"


def test_editing_the_arguments_does_not_edit_the_prompts():
    def vandal(prompts, completions, completion_ids, **kwargs):
        prompts[0][0]["content"] = "changed"
        completion_ids[0].clear()
        return [0.0] * len(completions)

    FunctionReward(vandal).score(GROUPS)
    assert MESSAGES == ({"role": "user", "content": "2+2?"},)
    assert GROUPS[0].completions[0].token_ids == (0, 106)


def test_a_function_that_raises_is_named_and_its_error_is_the_cause():
    def broken(completions, **kwargs):
        return [kwargs["gold"]]

    with pytest.raises(RewardError, match="reward 'broken' raised KeyError: 'gold'") as caught:
        FunctionReward(broken).score(GROUPS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_async_function_that_raises_is_named_too():
    async def broken(completions, **kwargs):
        raise TimeoutError("no answer")

    with pytest.raises(RewardError, match="reward 'broken' raised TimeoutError: no answer"):
        FunctionReward(broken).score(GROUPS)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "returned 1 scores for 4 completions"),
        ([1.0] * 5, "returned 5 scores for 4 completions"),
        (None, "returned None"),
        (1.0, r"returned 1.0 \(float\)"),
        ([0.0, float("nan"), 0.0, 0.0], "returned nan at index 1"),
        ([0.0, 0.0, "x", 0.0], "returned 'x' .* at index 2"),
        ([False] * 4, "returned False .* at index 0"),
    ],
)
def test_what_a_function_returns_wrongly_is_named(result, message):
    with pytest.raises(RewardError, match=f"reward 'mine' {message}"):
        FunctionReward(lambda **_: result, "mine").score(GROUPS)


def test_a_column_named_like_an_own_argument_is_refused():
    with pytest.raises(RewardError, match="column 'completions': the name is taken"):
        FunctionReward(text_length).score([group("a", completions=1)])


def test_what_is_no_function_is_refused():
    with pytest.raises(ValueError, match="must be callable, got str"):
        FunctionReward("length")
