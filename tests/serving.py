"""A server on this machine that speaks vLLM's protocol, with our engine behind it: token ids, adapters at run time, faults.

Replies have the fields that vLLM's documentation names. What it does wrong is switched on by a test; what it was asked is written down.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.data.batch import pad_rollouts
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.logprobs import completion_logprobs
from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.local import LocalEngine
from gemma_grpo.types import Prompt, RolloutGroup

Body = Mapping[str, Any]
NAME = "served"
"""The prompt's id behind the server: with a request's seed it decides every token."""


@dataclass
class Faults:
    """What a replica does wrong. A fault of completions is one of "drop", "500", "404", "400" and "hang"."""

    completions: Callable[[Body], str | None] = lambda body: None
    reply: Callable[[dict[str, Any]], Any] = lambda reply: reply
    ignores_adapters: bool = False
    serves_first_adapter: bool = False
    raw_logprobs: bool = False
    offset: float = 0.0
    no_adapters: bool = False
    older_ids: bool = False


@dataclass
class FakeVllm:
    """One replica with a model of its own, called `name`."""

    model: Gemma
    name: str
    faults: Faults = field(default_factory=Faults)
    asked: list[tuple[str, Body]] = field(default_factory=list)
    """(path, body) of every POST, in order of arrival."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Name -> path of those loaded now."""
    headers: list[Mapping[str, str]] = field(default_factory=list)
    port: int = 0
    lock: Any = field(default_factory=threading.RLock)
    """Of the model, whose requests outlive the server that took them."""
    ever: list[str] = field(default_factory=list)
    """Names of all adapters that were loaded, the first one first."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def completions(self) -> list[Body]:
        """What was asked of it, canaries left out."""
        return [body for path, body in self.asked if path == "/v1/completions" and not body.get("ignore_eos")]

    def app(self) -> Starlette:
        paths = {"/v1/completions": self.complete, "/v1/load_lora_adapter": self.load, "/v1/unload_lora_adapter": self.unload}
        posts = [Route(path, self._noted(path, endpoint), methods=["POST"]) for path, endpoint in paths.items()]
        return Starlette(routes=[*posts, Route("/v1/models", self.models)])

    def _noted(self, path: str, endpoint: Callable[[Body], Any]) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Response:
            body = await request.json()
            self.asked.append((path, body))
            self.headers.append(dict(request.headers))
            return await endpoint(body)

        return handle

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in (self.name, *self.adapters)]})

    async def load(self, body: Body) -> Response:
        name, path = body["lora_name"], body["lora_path"]
        if self.faults.no_adapters:
            return JSONResponse({"detail": "Not Found"}, 404)
        if name in self.adapters:
            return JSONResponse({"error": {"message": f"The lora adapter '{name}' has already been loaded."}}, 400)
        with self.lock:
            self.model.add_adapter(name)
            self.model.load_adapter(name, Path(path))  # raises where the folder is not whole: status 500
        self.adapters[name] = path
        self.ever.append(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, body: Body) -> Response:
        if body["lora_name"] not in self.adapters:
            return JSONResponse({"error": {"message": "The lora adapter cannot be found."}}, 404)
        del self.adapters[body["lora_name"]]
        self.forget(body["lora_name"])
        return PlainTextResponse("Success")

    def forget(self, name: str) -> None:
        """Delete an adapter from the model."""
        with self.lock, self.model.role("policy"):  # peft warns where the active one goes
            self.model.peft.delete_adapter(name)

    async def complete(self, body: Body) -> Response:
        fault = self.faults.completions(body)
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "drop":
            return StreamingResponse(_broken_off(), headers={"content-length": "1000"})
        if fault is not None:
            return PlainTextResponse(f"made \x1b[2J to fail with {fault}", int(fault))
        if body["model"] not in (self.name, *self.adapters):
            return JSONResponse({"error": {"message": f"The model `{body['model']}` does not exist."}}, 404)
        reply = self.faults.reply(await run_in_threadpool(self._sampled, body))
        return Response(reply if isinstance(reply, bytes) else json.dumps(reply), media_type="application/json")

    def _sampled(self, body: Body) -> dict[str, Any]:
        prompt = Prompt(NAME, "", (), tuple(body["prompt"]), "")
        role = "reference" if body["model"] == self.name or self.faults.ignores_adapters else body["model"]
        if role != "reference" and self.faults.serves_first_adapter:
            role = self.ever[0]
        with self.lock:
            engine = LocalEngine(self.model, stop_ids=() if body.get("ignore_eos") else body["stop_token_ids"])
            (group,) = engine.sample([prompt], asked_params(body, role))
            raw = self._raw(group, role) if self.faults.raw_logprobs else None
        logprobs = raw or [list(one.sampling_logprobs) for one in group.completions]
        return {"id": "cmpl-1", "model": body["model"], "choices": [self._choice(body, group, g, logprobs[g]) for g in range(body["n"])]}

    def _raw(self, group: RolloutGroup, role: str) -> list[list[float]]:
        """At temperature 1, as vLLM gives them unless it is told otherwise."""
        with self.model.role(role):
            values = completion_logprobs(self.model, pad_rollouts([group]))[0][0].tolist()
        return [row[: len(one.token_ids)] for row, one in zip(values, group.completions, strict=True)]

    def _choice(self, body: Body, group: RolloutGroup, g: int, logprobs: list[float]) -> dict[str, Any]:
        one = group.completions[g]
        choice: dict[str, Any] = {"index": g, "text": "<img src=x> not to be used", "finish_reason": one.finish, "stop_reason": None}
        tokens = [f"token_id:{token}" for token in one.token_ids]
        choice["logprobs"] = {"tokens": tokens, "token_logprobs": [min(0.0, value + self.faults.offset) for value in logprobs]}
        if not self.faults.older_ids:
            choice |= {"token_ids": list(one.token_ids), "prompt_token_ids": body["prompt"]}
        return choice


def asked_params(body: Body, role: str) -> SamplingParams:
    """A request as our engine samples it."""
    limits = {"num_generations": body["n"], "max_completion_length": body["max_tokens"], "temperature": body["temperature"]}
    return SamplingParams(**limits, top_k=max(0, body["top_k"]), top_p=body["top_p"], seed=body["seed"], step=0, role=role)


async def _broken_off() -> AsyncIterator[bytes]:
    yield b'{"choices": ['
    raise ConnectionResetError


@contextmanager
def serving(replica: FakeVllm) -> Iterator[FakeVllm]:
    """The replica answers inside, at its port; at one that is free where it has none yet."""
    config = uvicorn.Config(replica.app(), host="127.0.0.1", port=replica.port, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    replica.port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield replica
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def new_replica(checkpoint: Path, lora: LoraSettings | None = None) -> FakeVllm:
    """With a second copy of a checkpoint."""
    return FakeVllm(Gemma.load(str(checkpoint), lora=lora or LoraSettings(), precision="fp32"), str(checkpoint))


# ---- what tests of an engine need beside it


class Told(list[tuple[str, str, Mapping[str, Any]]]):
    """What an engine reported."""

    def __call__(self, what: str, text: str, fields: Mapping[str, Any]) -> None:
        print(f"{what}: {text} {dict(fields)}")  # shown where a test fails
        self.append((what, text, fields))

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter({what: sum(fields.get("count", 1) for one, _, fields in self if one == what) for what, _, _ in self}))


def update(learner: Gemma) -> None:
    """As an update leaves it: other weights."""
    with torch.no_grad():
        for value in learner.adapter_parameters("policy").values():
            value.mul_(1.2)


def ids(groups: Sequence[RolloutGroup]) -> list[list[tuple[int, ...]]]:
    return [[one.token_ids for one in group.completions] for group in groups]


def prompts_asked(replica: FakeVllm) -> list[tuple[int, ...]]:
    return [tuple(body["prompt"]) for body in replica.completions]


def faults_in_turn(*kinds: str | None) -> Callable[[Body], str | None]:
    """One fault after another, canaries left alone; the last one stays."""
    left = list(kinds)

    def next_fault(body: Body) -> str | None:
        if body.get("ignore_eos"):
            return None
        return left.pop(0) if len(left) > 1 else left[0]

    return next_fault
