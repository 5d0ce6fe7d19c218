"""Completions asked for before their step: never of a policy that is further behind than allowed, and never of use for other prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
from serving import Told, faults_in_turn, ids, prompts_asked, update

from gemma_grpo.config.machine import ServingSettings
from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.wire import request_seed
from gemma_grpo.types import Prompt

PARAMS = SamplingParams(num_generations=2, max_completion_length=4, seed=3, step=0)
STEPS = 5


@pytest.fixture
def coming(six_prompts):
    """Of each of five steps one prompt, and none after."""

    def prompts(step: int) -> Sequence[Prompt]:
        return six_prompts[step : step + 1] if step < STEPS else ()

    return prompts


@pytest.fixture
def new_engine(new_engine, replicas):
    """Of one replica: what is asked ahead does not depend on how many there are."""
    return partial(new_engine, urls=[replicas[0].url])


def at(step: int) -> SamplingParams:
    return replace(PARAMS, step=step)


@pytest.mark.parametrize("bound", [0, 1, 2, 9])
def test_a_policy_is_as_far_behind_as_allowed_and_no_further(learner, replicas, new_engine, coming, bound) -> None:
    engine = new_engine(max_staleness=bound, upcoming=coming)
    behind = []
    for step in range(STEPS):
        (group,) = engine.sample(coming(step), at(step))
        behind.append(step - group.policy_step)
        update(learner)
    # asked as early as may be: step n of the policy of step n - bound, or the first
    assert behind == [min(step, bound) for step in range(STEPS)]
    asked = [body for one in replicas for body in one.completions]
    # each once, with the random numbers of its own step, whoever sampled it
    assert sorted(body["seed"] for body in asked) == sorted(request_seed(at(step), coming(step)[0].prompt_id) for step in range(STEPS))
    assert len({body["model"] for body in asked}) == max(1, STEPS - bound)


def test_a_group_is_of_the_weights_that_its_policy_step_names(learner, new_engine, coming) -> None:
    plain = new_engine()
    engine = new_engine(max_staleness=1, upcoming=coming)
    engine.sample(coming(0), at(0))
    old = ids(plain.sample(coming(1), at(1)))  # step 1's prompts and random numbers, by the first weights
    for _ in range(4):
        update(learner)
    (group,) = engine.sample(coming(1), at(1))
    new = ids(plain.sample(coming(1), at(1)))
    assert ids([group]) == old != new
    assert group.policy_step == 0


def test_versions_stay_while_a_coming_step_was_asked_of_them(learner, replicas, new_engine, coming, tmp_path) -> None:
    engine = new_engine(max_staleness=2, upcoming=coming)
    for step in range(4):
        engine.sample(coming(step), at(step))
        update(learner)
        # the present version, and those that steps to come were asked of: the last two
        assert len(list((tmp_path / "serving").iterdir())) == min(step + 1, 3) == len(replicas[0].adapters)


def test_what_is_too_old_by_now_is_thrown_away_counted_and_sampled_again(learner, new_engine, coming) -> None:
    told = Told()
    engine = new_engine(max_staleness=2, upcoming=coming, told=told)
    engine.sample(coming(0), at(0))
    update(learner)
    engine.settings = ServingSettings(urls=engine.settings.urls, max_staleness=1)  # steps 1 and 2 were asked of step 0's policy
    (group,) = engine.sample(coming(2), at(2))
    assert group.policy_step == 2
    assert told.counts == {"too old": 2}  # step 1's, which has passed, and step 2's
    assert told[0][1] == "2 groups asked for ahead are of no use and sampled again"


def test_what_was_asked_for_other_prompts_or_otherwise_is_not_used(learner, new_engine, coming, six_prompts) -> None:
    told = Told()
    engine = new_engine(max_staleness=1, upcoming=coming, told=told)
    engine.sample(coming(0), at(0))
    update(learner)
    (group,) = engine.sample(six_prompts[5:], at(1))
    assert (group.prompt, group.policy_step) == (six_prompts[5], 1)
    (group,) = engine.sample(coming(2), replace(at(2), temperature=0.5))
    assert group.policy_step == 2
    assert told.counts == {"too old": 2}


def test_looks_and_evaluations_ask_nothing_ahead(replicas, new_engine, coming) -> None:
    engine = new_engine(max_staleness=1, upcoming=coming)
    engine.sample(coming(0), at(-2))
    engine.sample(coming(0), replace(at(0), role="reference"))
    assert sum(len(one.completions) for one in replicas) == 2


def test_what_nobody_can_answer_any_more_is_sampled_by_the_present_policy(learner, replicas, new_engine, coming) -> None:
    told = Told()
    engine = new_engine(max_staleness=1, upcoming=coming, told=told)
    first = request_seed(at(0), coming(0)[0].prompt_id)
    replicas[0].faults.completions = lambda body: None if body.get("ignore_eos") or body["seed"] == first else "500"
    engine.sample(coming(0), at(0))
    update(learner)
    while not any(what == "lost" for what, _, _ in told):  # the background finds that it is lost
        engine._tell()
    replicas[0].faults.completions = faults_in_turn(None)
    (group,) = engine.sample(coming(1), at(1))
    assert (group.prompt, group.policy_step) == (coming(1)[0], 1)
    assert told.counts == {"lost": 1, "back": 1, "retried": 1}


def test_nothing_ahead_is_kept_by_an_engine_that_was_closed(replicas, new_engine, coming) -> None:
    engine = new_engine(max_staleness=1, upcoming=coming)
    replicas[0].faults.completions = lambda body: (
        None if body.get("ignore_eos") or tuple(body["prompt"]) == coming(0)[0].token_ids else "hang"
    )
    engine.sample(coming(0), at(0))
    engine.close()  # at once, whatever hangs
    replicas[0].faults.completions = faults_in_turn(None)
    (group,) = engine.sample(coming(1), at(1))
    assert group.policy_step == 1
    assert prompts_asked(replicas[0])[-2] == coming(1)[0].token_ids
