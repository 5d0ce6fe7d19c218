"""What is asked of a replica, and which of its answers are taken: whatever is not what was asked for is refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.wire import MalformedError, Sampled, canary_ask, completions_ask, model_names, request_seed, sampled
from gemma_grpo.types import Prompt

PARAMS = SamplingParams(2, 3, temperature=0.7, top_k=5, top_p=0.9, seed=1, step=4)
PROMPT = Prompt("p", "test", (), (2, 105, 110), "c")
ASK = completions_ask(PROMPT, PARAMS, "policy-0-abc", 363)


def choice(index: int, ids: list[int], finish: str) -> dict[str, Any]:
    logprobs = {"tokens": [f"token_id:{token}" for token in ids], "token_logprobs": [-0.5] * len(ids)}
    return {"index": index, "token_ids": ids, "prompt_token_ids": [2, 105, 110], "logprobs": logprobs, "finish_reason": finish, "text": "?"}


GOOD = {"choices": [choice(1, [200, 201, 202], "length"), choice(0, [300, 106], "stop")]}
EXPECTED = [Sampled((300, 106), (-0.5, -0.5), "stop"), Sampled((200, 201, 202), (-0.5,) * 3, "length")]


def test_completions_are_read_in_their_order() -> None:
    assert sampled(json.dumps(GOOD).encode(), ASK) == EXPECTED


def test_ids_in_the_older_form_are_read_too() -> None:
    older = copy.deepcopy(GOOD)
    for one in older["choices"]:
        del one["token_ids"], one["prompt_token_ids"]
    assert sampled(json.dumps(older).encode(), ASK) == EXPECTED


def first(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda reply: reply["choices"][0].update(fields)


def logprobs(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda reply: reply["choices"][0]["logprobs"].update(fields)


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no choices": (lambda reply: reply.pop("choices"), "no choices that is of type list"),
    "one choice too few": (lambda reply: reply["choices"].pop(), "1 choices, 2 were asked for"),
    "one choice too many": (lambda reply: reply["choices"].append(choice(2, [106], "stop")), "3 choices, 2 were asked for"),
    "one index twice": (first(index=0), "not numbered 0 to 1"),
    "an index that is none": (first(index=True), "no index that is of type int"),
    "a choice that is none": (lambda reply: reply["choices"].__setitem__(0, [1]), "a choice is no object"),
    "ids beyond the vocabulary": (first(token_ids=[200, 363, 202]), "not in the vocabulary, 0 to 362"),
    "negative ids": (first(token_ids=[200, -1, 202]), "not in the vocabulary"),
    "ids that are no numbers": (first(token_ids=[200, "201", 202]), "not in the vocabulary"),
    "true as an id": (first(token_ids=[200, True, 202]), "not in the vocabulary"),
    "fewer log-probabilities": (logprobs(token_logprobs=[-0.5, -0.5]), "3 tokens with 2 log-probabilities"),
    "NaN": (logprobs(token_logprobs=[-0.5, float("nan"), -0.5]), "no finite number of at most 0"),
    "minus infinity": (logprobs(token_logprobs=[-0.5, float("-inf"), -0.5]), "no finite number of at most 0"),
    "above 0": (logprobs(token_logprobs=[-0.5, 0.1, -0.5]), "no finite number of at most 0"),
    "null": (logprobs(token_logprobs=[None, -0.5, -0.5]), "no finite number of at most 0"),
    "no log-probabilities": (first(logprobs=None), "no logprobs that is of type dict"),
    "an unknown end": (first(finish_reason="abort\x1b[2J"), r"finish_reason 'abort\\x1b\[2J' does not go"),
    "stop without a stop token": (first(finish_reason="stop"), "finish_reason 'stop' does not go"),
    "length before the limit": (lambda reply: reply["choices"].__setitem__(0, choice(1, [200], "length")), "finish_reason 'length'"),
    "length with a stop token": (first(token_ids=[200, 201, 106]), "finish_reason 'length' does not go"),
    "a stop token in the middle": (first(token_ids=[1, 201, 106], finish_reason="stop"), r"stop tokens at \[0, 2\]"),
    "longer than the limit": (
        lambda reply: reply["choices"].__setitem__(0, choice(1, [200] * 4, "length")),
        "4 tokens, 1 to 3 are possible",
    ),
    "empty": (lambda reply: reply["choices"].__setitem__(0, choice(1, [], "stop")), "0 tokens, 1 to 3"),
    "another prompt": (first(prompt_token_ids=[2, 105]), "for another prompt"),
    "no ids": (lambda reply: [reply["choices"][0].pop("token_ids"), reply["choices"][0]["logprobs"].pop("tokens")], "no token ids"),
    "text for ids": (lambda reply: [first(token_ids=None)(reply), logprobs(tokens=["a", "b", "c"])(reply)], "no token ids"),
    "ids of many digits": (
        lambda reply: [first(token_ids=None)(reply), logprobs(tokens=["token_id:" + "9" * 5000])(reply)],
        "no token ids",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(name: str) -> None:
    spoil, text = BROKEN[name]
    reply = copy.deepcopy(GOOD)
    spoil(reply)
    with pytest.raises(MalformedError, match=text):
        sampled(json.dumps(reply).encode(), ASK)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff\xfe", b"[" * 100_000, b'{"choices": ' + b"9" * 5000 + b"}"])
def test_what_is_not_json_is_refused(content: bytes) -> None:
    with pytest.raises(MalformedError, match="it is not JSON"):
        sampled(content, ASK)
    with pytest.raises(MalformedError, match="it is no JSON object"):
        sampled(b"[]", ASK)


def test_a_request_says_everything_that_a_servers_defaults_could_change() -> None:
    body = dict(ASK.body)
    assert (body["model"], body["prompt"], body["n"], body["max_tokens"]) == ("policy-0-abc", [2, 105, 110], 2, 3)
    assert (body["temperature"], body["top_k"], body["top_p"], body["min_p"], body["repetition_penalty"]) == (0.7, 5, 0.9, 0.0, 1.0)
    assert body["stop_token_ids"] == [1, 106]
    assert body["return_token_ids"] is True
    assert completions_ask(PROMPT, SamplingParams(2, 3), "m", 363).body["top_k"] == -1  # off, in vLLM's words
    # a canary compares with the learner's own distribution, which no filter changes, over a length that no stop token cuts
    canary = canary_ask(PROMPT, PARAMS, "m", 363).body
    assert (canary["top_k"], canary["top_p"], canary["temperature"], canary["max_tokens"]) == (-1, 1.0, 0.7, 16)
    assert canary["ignore_eos"] is True
    assert "stop_token_ids" not in canary


def test_a_groups_random_numbers_are_its_own() -> None:
    seeds = {request_seed(SamplingParams(2, 3, seed=seed, step=step), name) for seed in (0, 1) for step in (0, 1) for name in "ab"}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**48 for seed in seeds)
    assert ASK.body["seed"] == request_seed(PARAMS, "p")


def test_models_are_listed_by_name() -> None:
    assert model_names(b'{"data": [{"id": "base"}, {"id": 3}, "x", {"id": "policy-0"}]}') == {"base", "policy-0"}
    with pytest.raises(MalformedError, match="no data"):
        model_names(b"{}")
