"""Settings of the machines a run has: speed, memory, when to give up. What is learned changes with `serving` and `sandbox` alone."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from gemma_grpo.config.base import Count, Positive, Stage, Whole


class MemorySettings(Stage):
    """How much is held at a time. It decides speed and memory, never the result: gradients and completions stay the same."""

    limit_gib: Positive | None = None
    """Device memory this run may use, GiB (2^30 bytes); null takes what the card (or without one the machine) has."""
    token_budget: Count | None = None
    """Tokens of one forward and backward pass, prompt and completions; null takes what batch_size full groups hold, if it fits."""
    kv_token_budget: Count | None = None
    """Tokens of keys and values held at a time while sampling; null samples a whole step's prompts together, if they fit."""


class WatchdogSettings(Stage):
    """Says what is waited for when a phase of a step takes far longer than it used to; it never ends anything."""

    factor: Annotated[float, Field(gt=1)] | None = 10.0
    """Times its own median that a phase may take before a line says so; null switches the watchdog off."""
    floor_seconds: Positive = 60.0
    """No line before so many seconds; ten times as many for a phase whose usual length is not known yet."""


class RanksSettings(Stage):
    """How several processes work on one run. None of it changes what is computed."""

    timeout_seconds: Positive = 600.0
    """How much later than the others a rank may have done its share before it is given up."""
    grace_seconds: Positive = 60.0
    """What ranks that were asked to stop have to save in, before they are killed."""
    max_restarts: Whole = 0
    """Times that all are started again after one has failed, to go on from the last checkpoint."""


class SandboxSettings(Stage):
    """What a program of the reward "unit_tests" may use; network and files are never its to have (docs/applications.md)."""

    seconds: Annotated[float, Field(gt=0, le=600)] = 5.0
    """Processor time of one program and all of its tests; by the clock it has three times as long."""
    memory_mib: Annotated[int, Field(ge=64, le=65536)] = 512
    """Memory of one program, MiB; Python itself takes about 30 of them."""


class ServingSettings(Stage):
    """Replicas of an inference server that sample in the place of this process (docs/serving.md). Experimental."""

    urls: tuple[str, ...] = ()
    """Addresses of the replicas, such as http://host:8000; none: sample in this process. A key comes from the variable VLLM_API_KEY."""
    adapters: str | None = None
    """Folder that this run and all replicas see by the same path, for the policy's versions; null takes the run's own, serving/."""
    max_staleness: Annotated[int, Field(ge=0, le=64)] = 0
    """Updates a policy may be behind when its completions are learned from; 0: each step waits for its own policy's."""
    timeout_seconds: Positive = 600.0
    """How long a replica may take over one request, a prompt with all of its completions, before it counts as lost."""
    tolerance: Positive = 0.1
    """Mean |replica - learner| log-probability, nats, above which the run stops; ln 1.1 = 0.095 is NeMo RL's limit."""

    @field_validator("urls")
    @classmethod
    def _usable(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        found = tuple(url.rstrip("/") for url in urls)
        for number, url in enumerate(found):
            _check_url(url, f"entry {number + 1}")
            if url in found[:number]:
                raise ValueError(f"names {url} twice. Name each replica once.")
        return found


def _check_url(url: str, which: str) -> None:
    """Raise ValueError unless it is an address of a server alone. A secret in it is not repeated."""
    example = "Write it as http://host:8000."
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"has in {which} no address that can be read ({error}). {example}") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"has a user or password in {which}, and settings are written to files. Put the key into the variable VLLM_API_KEY."
        )
    if parts.scheme not in ("http", "https") or not host or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"has in {which} {url!r:.80}, which is no http or https address. {example}")
    if parts.query or parts.fragment:
        raise ValueError(f"has in {which} {url!r:.80}, with a part behind ? or #. {example}")
    if parts.path.endswith("/v1"):
        raise ValueError(f"has in {which} {url!r:.80}; /v1 is added to it. Leave it out.")
