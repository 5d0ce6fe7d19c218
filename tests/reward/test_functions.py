from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from gemma_grpo.config import RewardFunctionSettings
from gemma_grpo.reward.base import RewardError, Skipped
from gemma_grpo.reward.functions import FunctionReward
from gemma_grpo.stopping import Stopped
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
    def vandal(prompts, completions, completion_ids, tests, **kwargs):
        prompts[0][0]["content"] = "changed"
        completion_ids[0].clear()
        tests[0][0]["expected"].append("anything")
        tests[1].clear()
        return [0.0] * len(completions)

    asked = group("a", "bb", tests=[{"expected": ["4"]}])
    FunctionReward(vandal).score([asked])
    assert MESSAGES == ({"role": "user", "content": "2+2?"},)
    assert asked.completions[0].token_ids == (0, 106)
    assert asked.prompt.columns == {"tests": [{"expected": ["4"]}]}


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
        ([0.0, float("nan"), 0.0, 0.0], r"returned nan for 1 of 4 completions \(index 1, prompt id\)"),
        ([0.0, 0.0, "x", 0.0], r"returned 'x' \(str\) for 1 of 4 completions \(index 2, prompt id\)"),
        ([False] * 4, r"returned False \(bool\) for 4 of 4 completions \(first index 0, prompt id\)"),
    ],
)
def test_what_a_function_returns_wrongly_is_named(result, message):
    with pytest.raises(RewardError, match=f"reward 'mine' {message}"):
        FunctionReward(lambda **_: result, "mine").score(GROUPS)


# ---- failures that may be skipped

SKIP = RewardFunctionSettings(on_failure="skip")


def named(name: str, *texts: str) -> RolloutGroup:
    return RolloutGroup(replace(group().prompt, prompt_id=name), group(*texts).completions, 0)


def failing_on(*bad: str, calls: list[list[str]] | None = None):
    """A reward that cannot take some texts."""

    def reward(completions, **columns):
        texts = [completion[0]["content"] for completion in completions]
        if calls is not None:
            calls.append(texts)
        if set(bad) & set(texts):
            raise LookupError(f"no word like {min(set(bad) & set(texts))}")
        return [float(len(text)) for text in texts]

    return reward


def test_a_call_that_fails_is_made_again_for_each_group_and_only_those_that_fail_again_are_skipped():
    calls: list[list[str]] = []
    reward = FunctionReward(failing_on("bb", calls=calls), "mine", SKIP)
    scores, skipped = reward.score_or_skip([named("p", "a"), named("q", "a", "bb"), named("r", "ccc", "a")])
    assert scores == [[1.0], [None, None], [3.0, 1.0]]
    assert skipped.completions == 2
    assert skipped.warning == (
        "reward 'mine' left 2 of 5 completions without a score (2 raised LookupError). "
        "The last: it raised LookupError: no word like bb. It was scoring 2 completions of prompt q."
    )
    assert calls == [["a", "a", "bb", "ccc", "a"], ["a"], ["a", "bb"], ["ccc", "a"]]


def test_a_group_that_is_called_alone_has_the_columns_of_all():
    def reward(completions, topic):
        if len(completions) > 2:
            raise LookupError
        return [0.0 if subject is None else 1.0 for subject in topic]

    assert FunctionReward(reward, "mine", SKIP).score(GROUPS) == [[0.0, 0.0], [1.0, 1.0]]  # only the second has a topic


def test_a_call_that_does_not_fail_is_made_once_and_nothing_is_said():
    calls: list[list[str]] = []
    assert FunctionReward(failing_on(calls=calls), "mine", SKIP).score_or_skip([named("p", "a"), named("q", "")]) == (
        [[1.0], [0.0]],
        Skipped(0, None),
    )
    assert calls == [["a", ""]]


def test_where_nothing_may_be_skipped_nothing_is_counted():
    assert FunctionReward(text_length).score_or_skip(GROUPS) == ([[1.0, 2.0], [3.0, 0.0]], None)


def test_causes_are_counted_apart():
    values = {"a": 1.0, "bb": float("nan"), "ccc": "good", "": None}

    def reward(completions, **columns):
        return [values[completion[0]["content"]] for completion in completions]

    settings = RewardFunctionSettings(on_failure="skip", max_skipped=0.75)
    scores, skipped = FunctionReward(reward, "mine", settings).score_or_skip([named("p", "a", "bb"), named("q", "ccc", "bb")])
    assert scores == [[1.0, None], [None, None]]
    assert skipped == Skipped(
        3,
        "reward 'mine' left 3 of 4 completions without a score (2 returned nan, 1 returned a str). "
        "The last: it returned 'good' (str) for 1 of 4 completions (index 2, prompt q).",
    )
    # None is an answer, not a failure
    assert FunctionReward(reward, "mine", settings).score_or_skip([named("p", "", "a")]) == ([[None, 1.0]], Skipped(0, None))


@pytest.mark.parametrize(("bad", "skipped"), [(["a"], 1), (["a", "bb"], 2), (["a", "bb", "ccc"], None)])
def test_more_than_the_share_that_may_be_skipped_stops_the_run(bad, skipped):
    groups = [named(text or "none", text) for text in ("a", "bb", "ccc", "")]
    reward = FunctionReward(failing_on(*bad), "mine", SKIP)
    if skipped is not None:  # half of four may
        assert reward.score_or_skip(groups)[1].completions == skipped
        return
    with pytest.raises(RewardError) as caught:
        reward.score_or_skip(groups)
    assert str(caught.value) == (
        "reward 'mine' left 3 of 4 completions without a score (3 raised LookupError), more than reward_function.max_skipped (0.5) allows. "
        "The last: it raised LookupError: no word like ccc. It was scoring 1 completions of prompt ccc. "
        "Mend it, or raise reward_function.max_skipped."
    )
    assert isinstance(caught.value.__cause__, LookupError)


def test_a_hopeless_step_is_given_up_as_soon_as_it_is_one():
    calls: list[list[str]] = []
    with pytest.raises(RewardError, match="left 2 of 10 completions"):
        FunctionReward(failing_on("a", calls=calls), "mine", RewardFunctionSettings(on_failure="skip", max_skipped=0.1)).score(
            [named(str(n), "a") for n in range(10)]
        )
    assert len(calls) == 3  # all ten, and two of them


def test_each_group_has_its_own_deadline(tmp_path):
    def slow(completions, **columns):
        texts = [completion[0]["content"] for completion in completions]
        with open(tmp_path / "calls", "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {' '.join(texts)}\n")
        if "slow" in texts:
            time.sleep(600)
        return [1.0] * len(texts)

    settings = RewardFunctionSettings(on_failure="skip", timeout=3.0)
    scores, skipped = FunctionReward(slow, "mine", settings).score_or_skip([named("p", "a"), named("q", "slow"), named("r", "b", "c")])
    assert scores == [[1.0], [None], [1.0, 1.0]]
    assert skipped == Skipped(
        1,
        "reward 'mine' left 1 of 4 completions without a score (1 exceeded 3.0 s). "
        "The last: it exceeded 3.0 s on 1 completions of prompt q: killed.",
    )
    calls = [line.split() for line in (tmp_path / "calls").read_text(encoding="utf-8").splitlines()]
    assert [texts for _, *texts in calls] == [["a", "slow", "b", "c"], ["a"], ["slow"], ["b", "c"]]
    assert len({pid for pid, *_ in calls}) == 4


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_what_is_wrong_with_the_dataset_is_not_skipped(timeout):
    def needs(completions, source):
        return []

    settings = RewardFunctionSettings(on_failure="skip", max_skipped=1.0, timeout=timeout)
    with pytest.raises(RewardError, match="needs 'source'"):
        FunctionReward(needs, "needs", settings).score(GROUPS)
    with pytest.raises(RewardError, match="the name is taken"):
        FunctionReward(text_length, "mine", settings).score([group("a", completions=1)])


# ---- what goes through, and where it is said


@pytest.mark.parametrize("on_failure", ["stop", "skip"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped])
def test_a_wish_to_stop_goes_through(error, on_failure):
    def stops(**columns):
        raise error("by hand")

    with pytest.raises(error, match="by hand"):
        FunctionReward(stops, "mine", RewardFunctionSettings(on_failure=on_failure)).score(GROUPS)


def test_the_first_prompts_of_a_call_are_named_and_the_others_counted():
    with pytest.raises(RewardError, match=r"It was scoring 5 completions of prompts 0, 1, 2 and 2 more\. Mend it"):
        FunctionReward(failing_on("a")).score([named(str(n), "a") for n in range(5)])


def test_a_function_that_forks_does_not_make_a_second_trainer(tmp_path):
    program = f"""
import os
from gemma_grpo.config import RewardFunctionSettings
from gemma_grpo.reward.functions import FunctionReward
def forks(**columns):
    if os.fork():
        os.wait()
    return []
for timeout in (None, 60.0):
    FunctionReward(forks, "forks", RewardFunctionSettings(timeout=timeout)).score([])
    open({str(tmp_path / "trainers")!r}, "a").write("trained ")
"""
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)
    assert (tmp_path / "trainers").read_text(encoding="utf-8") == "trained trained "


def test_a_system_that_cannot_fork_is_told_before_anything_is_loaded():
    program = """
import os
del os.fork  # as on Windows
from gemma_grpo import GRPOTrainer
GRPOTrainer(model_name="/nowhere", dataset=[{"prompt": "x"}], reward=len, **{"reward_function.timeout": 2})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.rstrip().splitlines()[-1] == (
        "ValueError: reward_function.timeout is 2.0, but this system cannot fork, so a call cannot have its own process. "
        "Use reward_function.timeout=null, and let the function keep its own time."
    )


def test_a_column_named_like_an_own_argument_is_refused():
    with pytest.raises(RewardError, match="column 'completions': the name is taken"):
        FunctionReward(text_length).score([group("a", completions=1)])


def test_what_is_no_function_is_refused():
    with pytest.raises(ValueError, match="must be callable, got str"):
        FunctionReward("length")
