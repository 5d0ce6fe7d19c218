"""What a replica is asked and what its answers may be: OpenAI's completions with vLLM's token ids and adapters. Plain Python, no network.

An answer is a stranger's: it is read strictly, number by number, and its text is not used at all. Source: vLLM's documentation of its
OpenAI-compatible server (docs.vllm.ai, serving/openai_compatible_server and features/lora).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from gemma_grpo.data.chat import STOP_IDS
from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.types import Finish, Prompt

COMPLETIONS, MODELS = "/v1/completions", "/v1/models"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
CANARY_TOKENS = 16
_BYTES_PER_TOKEN = 1024
"""Of a completion's token: id, text, log-probability and the likeliest other, each named."""
_OLDER_ID = "token_id:"


class MalformedError(ValueError):
    """What is wrong with an answer."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One completion as numbers."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish


@dataclass(frozen=True)
class Ask:
    """One request: the completions of one prompt."""

    body: Mapping[str, Any]
    vocabulary: int
    """Number of token ids; the answer has none from it on."""

    @property
    def limit(self) -> int:
        """Bytes that its answer may have."""
        return 2**20 + _BYTES_PER_TOKEN * int(self.body["n"]) * int(self.body["max_tokens"]) + 32 * len(self.body["prompt"])

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion."""
        return tuple(self.body.get("stop_token_ids", ()))


def completions_ask(prompt: Prompt, params: SamplingParams, model: str, vocabulary: int) -> Ask:
    """A prompt's group, sampled by the model or adapter of that name."""
    body = {
        **_common(prompt, params, model),
        "n": params.num_generations,
        "max_tokens": params.max_completion_length,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,
        "stop_token_ids": list(STOP_IDS),
    }
    return Ask(body, vocabulary)


def canary_ask(prompt: Prompt, params: SamplingParams, model: str, vocabulary: int) -> Ask:
    """A few tokens to compare: unfiltered, and of one length whatever stops a reply, so that there is always enough of them."""
    body = {**_common(prompt, params, model), "n": 1, "max_tokens": CANARY_TOKENS, "top_p": 1.0, "top_k": -1, "ignore_eos": True}
    return Ask(body, vocabulary)


def request_seed(params: SamplingParams, prompt_id: str) -> int:
    """A number for a group's own random numbers, the same whoever is asked and however often; below 2^48: JSON keeps it exact."""
    return int.from_bytes(hashlib.sha256(f"{params.seed} {params.step} {prompt_id}".encode()).digest()[:6], "big")


def _common(prompt: Prompt, params: SamplingParams, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt.token_ids),
        "temperature": params.temperature,
        "seed": request_seed(params, prompt.prompt_id),
        "logprobs": 1,  # of the sampled token; 0 has meant "none" in some versions
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # how older versions say them
        "skip_special_tokens": False,
        # a checkpoint's generation_config.json would change what is not said
        **{"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    }


def sampled(content: bytes, ask: Ask) -> list[Sampled]:
    """The completions of an answer, in order. Raises MalformedError."""
    choices = _get(_document(content), "choices", list, "the answer")
    wanted = int(ask.body["n"])
    if len(choices) != wanted:
        raise MalformedError(f"it has {len(choices)} choices, {wanted} were asked for")
    by_index: dict[int, Sampled] = {}
    for choice in choices:
        if not isinstance(choice, dict):
            raise MalformedError("a choice is no object")
        by_index[_get(choice, "index", int, "a choice")] = _one(choice, ask)
    if sorted(by_index) != list(range(wanted)):
        raise MalformedError(f"its choices are not numbered 0 to {wanted - 1}")
    return [by_index[index] for index in range(wanted)]


def model_names(content: bytes) -> set[str]:
    """What a server serves, by name. Raises MalformedError."""
    listed = _get(_document(content), "data", list, "the list of models")
    return {one["id"] for one in listed if isinstance(one, dict) and isinstance(one.get("id"), str)}


def _one(choice: Mapping[str, Any], ask: Ask) -> Sampled:
    listed = _get(choice, "logprobs", dict, "a choice")
    ids, logprobs = _ids(choice, listed), _get(listed, "token_logprobs", list, "a choice's logprobs")
    echoed = choice.get("prompt_token_ids")
    if echoed is not None and echoed != ask.body["prompt"]:
        raise MalformedError("it was sampled for another prompt: prompt_token_ids are not those that were sent")
    if len(ids) != len(logprobs):
        raise MalformedError(f"it has {len(ids)} tokens with {len(logprobs)} log-probabilities")
    if any(not _is(token, int) or not 0 <= token < ask.vocabulary for token in ids):
        raise MalformedError(f"a token id is not in the vocabulary, 0 to {ask.vocabulary - 1}")
    if any(not _is(value, int, float) or not math.isfinite(value) or value > 0 for value in logprobs):
        raise MalformedError("a log-probability is no finite number of at most 0")
    return Sampled(tuple(ids), tuple(map(float, logprobs)), _finish(choice.get("finish_reason"), ids, ask))


def _ids(choice: Mapping[str, Any], listed: Mapping[str, Any]) -> list[Any]:
    given = choice.get("token_ids")
    if isinstance(given, list):
        return given
    tokens = listed.get("tokens")
    if isinstance(tokens, list) and all(isinstance(token, str) and token.startswith(_OLDER_ID) for token in tokens):
        numbers = [token.removeprefix(_OLDER_ID) for token in tokens]
        if all(number.isascii() and number.isdigit() and len(number) < 10 for number in numbers):
            return [int(number) for number in numbers]
    raise MalformedError("it has no token ids: neither token_ids nor tokens as token_id:N. Take a version that knows return_token_ids")


def _finish(reason: Any, ids: Sequence[int], ask: Ask) -> Finish:
    """Checked against the tokens, since a reward may read it."""
    stops = [place for place, token in enumerate(ids) if token in ask.stop_ids]
    limit = int(ask.body["max_tokens"])
    if not ids or len(ids) > limit:
        raise MalformedError(f"a completion has {len(ids)} tokens, 1 to {limit} are possible")
    last = len(ids) - 1
    if reason == "stop" and stops == [last]:
        return cast(Literal["stop"], reason)
    if reason == "length" and not stops and len(ids) == limit:
        return cast(Literal["length"], reason)
    raise MalformedError(
        f"finish_reason {str(reason)[:20]!r} does not go with its {len(ids)} tokens of at most {limit}, stop tokens at {stops[:3]}"
    )


def _document(content: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or too deep
        raise MalformedError("it is not JSON") from error
    if not isinstance(found, dict):
        raise MalformedError("it is no JSON object")
    return found


def _get(source: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    value = source.get(name)
    if not _is(value, kind):
        raise MalformedError(f"{where} has no {name} that is of type {kind.__name__}")
    return value


def _is(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
