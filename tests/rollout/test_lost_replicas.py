"""Replicas that break, hang, lie or are set up wrongly: a lost one loses its own requests alone, and nothing of a liar's is used."""

from __future__ import annotations

import os
import re
import signal
import threading
from contextlib import ExitStack
from typing import Any

import pytest
from serving import FakeVllm, Told, faults_in_turn, ids, prompts_asked, serving, update

from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.replicas import ServingError
from gemma_grpo.stopping import Stopped, listening

PARAMS = SamplingParams(num_generations=2, max_completion_length=6, seed=3, step=0)


@pytest.fixture
def expected(new_engine, replicas, six_prompts) -> list[list[tuple[int, ...]]]:
    """What replicas that do not fail would have given."""
    groups = new_engine().sample(six_prompts, PARAMS)
    for one in replicas:
        one.asked.clear()
    return ids(groups)


@pytest.mark.parametrize("fault", ["drop", "500", "hang", "404"])
def test_a_lost_replica_loses_its_requests_alone(replicas, new_engine, six_prompts, expected, fault) -> None:
    healthy, lost = replicas
    lost.faults.completions = faults_in_turn(None, fault)  # it answers once
    told = Told()
    engine = new_engine(told=told, timeout_seconds=60.0 if fault != "hang" else 3.0)
    assert ids(engine.sample(six_prompts, PARAMS)) == expected  # all of them, with the same random numbers
    again = len(prompts_asked(lost)) - 1
    assert again >= 1
    assert sorted(prompts_asked(healthy) + prompts_asked(lost)[:1]) == sorted(prompt.token_ids for prompt in six_prompts)
    assert told.counts == {"lost": 1, "retried": again}
    what, text, fields = told[0]
    assert (what, fields["replica"]) == ("lost", lost.url)
    assert text.startswith(f"replica {lost.url} is lost (")
    assert "\x1b" not in text  # what a server says is shown as text


def test_a_lost_replica_is_tried_again_after_each_update_and_not_before(learner, replicas, new_engine, six_prompts) -> None:
    healthy, lost = replicas
    lost.faults.completions = faults_in_turn("500")
    told = Told()
    engine = new_engine(told=told)
    engine.sample(six_prompts, PARAMS)
    lost.asked.clear()
    engine.sample(six_prompts, PARAMS)
    assert not lost.asked
    lost.faults.completions = lambda body: "500"  # its canaries fail, too
    update(learner)
    engine.sample(six_prompts, PARAMS)
    assert [path for path, _ in lost.asked] == ["/v1/load_lora_adapter", "/v1/completions"]
    lost.faults.completions = lambda body: None
    lost.asked.clear()
    update(learner)
    engine.sample(six_prompts, PARAMS)
    # what went while it was lost goes there too, and a canary comes first
    assert [path for path, _ in lost.asked][:4] == [
        "/v1/unload_lora_adapter",
        "/v1/load_lora_adapter",
        "/v1/completions",
        "/v1/completions",
    ]
    assert [body.get("ignore_eos") for _, body in lost.asked[2:4]] == [True, True]
    assert prompts_asked(lost)
    assert told.counts == {"lost": 1, "retried": told.counts["retried"], "back": 1}
    assert list(lost.adapters) == list(healthy.adapters)


def test_a_replica_that_is_not_there_from_the_start_is_done_without(replicas, new_engine, six_prompts, expected) -> None:
    told = Told()
    urls = [replicas[0].url, "http://127.0.0.1:1"]
    assert ids(new_engine(urls=urls, told=told).sample(six_prompts, PARAMS)) == expected
    assert told.counts == {"lost": 1}
    assert "ConnectError" in told[0][1]


def test_without_any_replica_each_is_named_with_its_reason(replicas, new_engine, six_prompts) -> None:
    replicas[0].faults.completions = faults_in_turn("500")
    replicas[1].faults.completions = faults_in_turn("drop")
    told = Told()
    first, second = (re.escape(one.url) for one in replicas)
    with pytest.raises(
        ServingError, match=rf"^no replica is left to ask: {first}: status 500 .*; {second}: RemoteProtocolError .*\. Start"
    ):
        new_engine(told=told).sample(six_prompts, PARAMS)
    assert told.counts["lost"] == 2


def test_a_replica_that_was_started_again_is_given_its_adapter_again(learner, new_engine, replicas, six_prompts, expected) -> None:
    model = replicas[0]
    with ExitStack() as running:
        one = FakeVllm(model.model, model.name, lock=model.lock)
        first = running.enter_context(ExitStack())
        first.enter_context(serving(one))
        told = Told()
        engine = new_engine(urls=[one.url, replicas[1].url], told=told)
        assert ids(engine.sample(six_prompts, PARAMS)) == expected
        first.close()
        for name in [*one.adapters]:
            one.forget(name)
        again = running.enter_context(serving(FakeVllm(model.model, model.name, port=one.port, lock=model.lock)))
        assert ids(engine.sample(six_prompts, PARAMS)) == expected  # it does not know the adapter: 404, and the other is asked
        assert told.counts["lost"] == 1
        update(learner)
        engine.sample(six_prompts, PARAMS)
        assert prompts_asked(again)
        engine.close()


# ---- set up wrongly


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"faults.completions": faults_in_turn("400")}, r"refuses /v1/completions with status 400: made \\x1b\[2J to fail with 400\. "),
        ({"faults.no_adapters": True}, r"refuses /v1/load_lora_adapter with status 404: .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        ({"name": "another/\x1b[2Jmodel"}, r"serves another/\\x1b\[2Jmodel, not .*\. Start it with --served-model-name "),
    ],
)
def test_what_is_set_up_wrongly_ends_the_run_at_once(replicas, new_engine, six_prompts, fields, message) -> None:
    for name, value in fields.items():
        owner = replicas[1].faults if name.startswith("faults.") else replicas[1]
        setattr(owner, name.removeprefix("faults."), value)
    with pytest.raises(ServingError, match=rf"^replica {re.escape(replicas[1].url)} {message}"):
        new_engine().sample(six_prompts, PARAMS)


def test_a_folder_that_cannot_be_written_is_named(replicas, new_engine, six_prompts, tmp_path) -> None:
    (tmp_path / "serving").write_text("a file")
    with pytest.raises(ServingError, match=r"serving cannot be written .* serving\.adapters"):
        new_engine().sample(six_prompts, PARAMS)


# ---- liars


def without_ids(reply: dict[str, Any]) -> dict[str, Any]:
    for choice in reply["choices"]:
        del choice["token_ids"], choice["logprobs"]["tokens"]
    return reply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_ids, "sent an answer that cannot be learned from: it has no token ids"),
        (lambda reply: b"<html>", "sent an answer that cannot be learned from: it is not JSON"),
        (lambda reply: {**reply, "padding": "x" * 2**21}, "answers /v1/completions with more than [0-9]+ bytes"),
    ],
)
def test_an_answer_that_cannot_be_is_an_error_of_that_replica(replicas, new_engine, six_prompts, change, message) -> None:
    replicas[1].faults.reply = change
    with pytest.raises(ServingError, match=rf"^replica {re.escape(replicas[1].url)} {message}"):
        new_engine().sample(six_prompts, PARAMS)


def test_the_servers_text_is_not_used(new_engine, six_prompts) -> None:
    groups = new_engine().sample(six_prompts, PARAMS)
    assert not [one for group in groups for one in group.completions if "not to be used" in one.text]


# ---- ending


def test_a_request_to_stop_is_heard_while_replicas_are_waited_for(replicas, new_engine, six_prompts) -> None:
    def hang_and_stop(body: Any) -> str | None:
        if body.get("ignore_eos"):
            return None
        os.kill(os.getpid(), signal.SIGTERM) if not asked else None
        asked.append(body)
        return "hang"

    asked: list[Any] = []
    for one in replicas:
        one.faults.completions = hang_and_stop
    engine = new_engine(timeout_seconds=1000.0)
    with listening(), pytest.raises(Stopped):
        engine.sample(six_prompts, PARAMS)
    engine.close()
    assert not [one for one in threading.enumerate() if one.name == "serving"]
