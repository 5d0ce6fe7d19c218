"""Replicas in the place of our own engine: the same completions, one policy for all, and what becomes of those that fail or lie."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
import torch
from serving import NAME, asked_params, ids, prompts_asked, update

from gemma_grpo.data.batch import pad_rollouts, pad_values
from gemma_grpo.model.logprobs import completion_logprobs
from gemma_grpo.rollout.engine import RolloutEngine, SamplingParams
from gemma_grpo.rollout.local import LocalEngine
from gemma_grpo.rollout.replicas import ServingError
from gemma_grpo.types import Prompt

PARAMS = SamplingParams(num_generations=3, max_completion_length=6, seed=3, step=0)


# ---- what is sampled


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.6, "top_k": 5, "top_p": 0.9}, {"role": "reference"}, {"role": "reward"}], ids=str
)
def test_completions_are_those_of_our_own_engine(learner, replicas, new_engine, six_prompts, changes) -> None:
    params = SamplingParams(**{"num_generations": 3, "max_completion_length": 6, "seed": 3, "step": 0, **changes})
    engine = new_engine()
    assert isinstance(engine, RolloutEngine)
    groups = engine.sample(six_prompts, params)
    assert [group.prompt for group in groups] == six_prompts
    asked = {tuple(body["prompt"]): body for one in replicas for body in one.completions}
    for group in groups:
        own = Prompt(NAME, "", (), group.prompt.token_ids, "")
        (expected,) = LocalEngine(learner).sample([own], asked_params(asked[own.token_ids], params.role))
        assert ids([group]) == ids([expected])
        assert [(one.text, one.finish) for one in group.completions] == [(one.text, one.finish) for one in expected.completions]
        for one, other in zip(group.completions, expected.completions, strict=True):
            assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=1e-4)
    assert all(prompts_asked(one) for one in replicas)  # both are given work
    assert sum(len(prompts_asked(one)) for one in replicas) == len(six_prompts)


def test_log_probabilities_are_the_learners(learner, new_engine, six_prompts) -> None:
    groups = new_engine().sample(six_prompts, SamplingParams(3, 6, temperature=0.7))
    batch = pad_rollouts(groups)
    with learner.role("policy"), torch.no_grad():
        own = completion_logprobs(learner, batch, temperature=0.7)[0]
    sampled = pad_values([[one.sampling_logprobs for one in group.completions] for group in groups], batch)
    torch.testing.assert_close(sampled, own, rtol=0, atol=1e-4)


def test_nothing_is_asked_for_no_prompts(replicas, new_engine) -> None:
    assert new_engine().sample([], PARAMS) == []
    assert not replicas[0].asked


def test_older_servers_that_name_ids_in_the_tokens_are_understood(replicas, new_engine, six_prompts) -> None:
    new = ids(new_engine().sample(six_prompts, PARAMS))
    for one in replicas:
        one.faults.older_ids = True
    assert ids(new_engine().sample(six_prompts, PARAMS)) == new


# ---- one policy for all


def test_the_same_weights_are_sent_once_and_the_last_ones_go(learner, replicas, new_engine, six_prompts, tmp_path) -> None:
    engine = new_engine()
    for step in (0, 1):
        engine.sample(six_prompts, SamplingParams(3, 6, step=step))
    engine.sample(six_prompts, SamplingParams(3, 6, role="reference"))
    assert [len(one.ever) for one in replicas] == [1, 1]
    (first,) = replicas[0].adapters
    assert replicas[0].adapters == {first: str(tmp_path / "serving" / first)}
    update(learner)
    engine.sample(six_prompts, PARAMS)
    (second,) = (path.name for path in (tmp_path / "serving").iterdir())
    assert second != first
    assert [list(one.adapters) for one in replicas] == [[second], [second]]
    engine.close()
    assert not list((tmp_path / "serving").iterdir())
    assert [one.adapters for one in replicas] == [{}, {}]
    assert not [one for one in threading.enumerate() if one.name == "serving"]
    assert ids(engine.sample(six_prompts[:1], PARAMS))  # and it can begin again


def test_what_a_killed_run_left_is_unloaded_and_deleted(replicas, new_engine, six_prompts, tmp_path) -> None:
    left = new_engine()
    left.sample(six_prompts, PARAMS)  # and is never closed
    (old,) = replicas[0].adapters
    new_engine().sample(six_prompts, PARAMS)
    (new,) = (path.name for path in (tmp_path / "serving").iterdir())
    assert new != old
    assert [list(one.adapters) for one in replicas] == [[new], [new]]


def test_the_key_goes_to_the_replicas_and_nowhere_else(replicas, new_engine, six_prompts, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "a-key-of-the-cluster")
    new_engine().sample(six_prompts, PARAMS)
    assert {headers["authorization"] for headers in replicas[0].headers} == {"Bearer a-key-of-the-cluster"}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"a-key-of-the-cluster" in path.read_bytes()]


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"ignores_adapters": True}, r"does not apply the adapter: .* nats from the policy's and 0\.0000 from the untouched base's"),
        ({"offset": -0.3}, r"disagrees with the learner: their log-probabilities are 0\.3000 nats apart"),
        ({"raw_logprobs": True}, r"disagrees .* --logprobs-mode processed_logprobs \(temperature is 0\.5\)"),
    ],
)
def test_a_canary_stops_what_serves_another_policy(replicas, new_engine, six_prompts, faults, message) -> None:
    for name, value in faults.items():
        setattr(replicas[1].faults, name, value)
    with pytest.raises(ServingError, match=rf"^replica {re.escape(replicas[1].url)} {message}"):
        new_engine(tolerance=0.1).sample(six_prompts, SamplingParams(3, 6, temperature=0.5))
    assert not [body for one in replicas for body in one.completions]  # none that could have been learned from


def test_an_adapter_that_is_not_applied_is_found_below_the_tolerance_too(replicas, new_engine, six_prompts) -> None:
    replicas[0].faults.ignores_adapters = True
    with pytest.raises(ServingError, match="does not apply the adapter"):
        new_engine(tolerance=100.0).sample(six_prompts, PARAMS)


def test_a_replica_that_stays_with_an_older_version_is_found(learner, replicas, new_engine, six_prompts) -> None:
    engine = new_engine(tolerance=0.01)
    engine.sample(six_prompts, PARAMS)
    replicas[0].faults.serves_first_adapter = True
    with torch.no_grad():
        for value in learner.adapter_parameters("policy").values():
            value.mul_(2.0)
    first = replicas[0].ever[0]
    replicas[0].model.add_adapter("kept")  # the first version's weights, as the server would have kept them
    replicas[0].model.load_adapter("kept", Path(replicas[0].adapters[first]))
    replicas[0].ever[0] = "kept"
    with pytest.raises(ServingError, match="disagrees with the learner"):
        engine.sample(six_prompts, PARAMS)


def test_disagreement_below_the_tolerance_is_the_updates_to_correct(replicas, new_engine, six_prompts) -> None:
    exact = new_engine().sample(six_prompts, PARAMS)
    for one in replicas:
        one.faults.offset = -0.05
    for group, other in zip(new_engine(tolerance=0.06).sample(six_prompts, PARAMS), exact, strict=True):
        for one, plain in zip(group.completions, other.completions, strict=True):
            assert one.sampling_logprobs == pytest.approx([value - 0.05 for value in plain.sampling_logprobs], abs=1e-5)
