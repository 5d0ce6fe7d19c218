"""Replicas of an inference server: which are up, which has which adapters, who is asked next, and a thread that waits for their answers.

Owns HTTP, its deadlines and its limits. What is asked and what an answer may be is wire.py's; what is learned from it is nobody's here.
A replica that fails is not asked again until somebody tries it anew; what it was asked is asked of the others.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from typing import Any, TypeVar

from gemma_grpo.escapes import one_line
from gemma_grpo.rollout.wire import MODELS, MalformedError, model_names
from gemma_grpo.stopping import check

if sys.version_info >= (3, 11):
    import httpx2 as httpx
else:
    import httpx

API_KEY = "VLLM_API_KEY"
"""The variable that holds the key, as on the server's side."""
LONGEST_CONNECT = 10.0
"""Seconds for reaching a replica at all."""
SMALL_REPLY = 2**20
"""Bytes that any answer but completions may have."""
FAREWELL = 5.0
"""Seconds that replicas have to unload a run's adapters when it ends."""
NOT_ASKED_YET = "not asked yet"
_LONGEST_QUOTE = 300
_LOOK_EVERY = 0.1
"""Seconds between two looks whether the run was asked to stop."""

T = TypeVar("T")


class ServingError(RuntimeError):
    """The replicas cannot be learned from: none is left, one is set up wrongly, answers what cannot be, or serves another policy."""


class ReplicaLostError(Exception):
    """A replica did not answer, or said that it is broken; why. Of its requests alone."""


class Replica:
    """One server, and what is known of it."""

    def __init__(self, url: str, timeout: float, client: httpx.AsyncClient) -> None:
        self.url, self.timeout, self._client = url, timeout, client
        self.lost: str | None = NOT_ASKED_YET
        """Why it is not asked; None where it is."""
        self.verified: set[str] = set()
        """Names whose log-probabilities were compared with the learner's."""
        self.busy = 0
        """Requests under way."""

    async def call(
        self, method: str, path: str, body: Any = None, *, limit: int = SMALL_REPLY, lost_at: Sequence[int] = (), fine: Sequence[int] = ()
    ) -> bytes:
        """The content of a good answer, at most `limit` bytes.

        Raises ReplicaLostError for no answer in time, a connection that breaks, a status of 500 or above or in `lost_at`; ServingError
        for every other status but 200 and those in `fine`, and for an answer that is too long.
        """
        try:
            status, content = await asyncio.wait_for(self._exchange(method, path, body, limit), self.timeout)
        except asyncio.TimeoutError:
            raise ReplicaLostError(f"no answer to {path} within {self.timeout:g} s") from None
        except httpx.TransportError as error:
            raise ReplicaLostError(one_line(f"{type(error).__name__} at {path}: {error}", limit=_LONGEST_QUOTE)) from error
        if status == 200 or status in fine:
            return content
        said = one_line(content.decode("utf-8", errors="replace"), limit=_LONGEST_QUOTE)
        if status >= 500 or status in lost_at:
            raise ReplicaLostError(f"status {status} at {path}: {said}")
        raise ServingError(f"replica {self.url} refuses {path} with status {status}: {said}. {HOW_TO_START}")

    async def _exchange(self, method: str, path: str, body: Any, limit: int) -> tuple[int, bytes]:
        content = bytearray()
        async with self._client.stream(method, f"{self.url}{path}", json=body) as response:
            # raw: a compressed answer could be any size once it is unpacked, and none was asked for
            async for piece in response.aiter_raw():
                content += piece
                if len(content) > limit:
                    raise ServingError(f"replica {self.url} answers {path} with more than {limit} bytes, which no good answer has.")
        return response.status_code, bytes(content)

    async def names(self) -> set[str]:
        """The models and adapters that it serves. Raises as `call` does."""
        try:
            return model_names(await self.call("GET", MODELS))
        except MalformedError as error:
            raise ServingError(f"replica {self.url}: {error}. Is it a server of the OpenAI protocol?") from error


HOW_TO_START = (
    "Replicas are started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora, --max-lora-rank of at least lora.r, and see the "
    "folder serving.adapters by the same path (docs/serving.md)."
)


def _client(timeout: float) -> httpx.AsyncClient:
    key = os.environ.get(API_KEY, "").strip()
    headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})}
    patience = httpx.Timeout(None, connect=min(LONGEST_CONNECT, timeout))
    # as many connections as requests, since a server queues them better than we could; and a new one for each, since one that the server
    # has just closed for being idle would pass for a lost replica
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(headers=headers, timeout=patience, limits=limits)


class Replicas:
    """All of a run's, and the thread in which they are asked. To be closed."""

    def __init__(self, urls: Sequence[str], timeout: float) -> None:
        self._client = _client(timeout)
        self.all = [Replica(url, timeout, self._client) for url in urls]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="serving", daemon=True)
        self._thread.start()

    def able(self, version: str) -> list[Replica]:
        """Those that answer, as far as is known, and were found to have that version."""
        return [replica for replica in self.all if replica.lost is None and version in replica.verified]

    def why_none(self, version: str) -> str:
        """Each replica and why it is not asked for that version, as an error says it."""
        reasons = "; ".join(f"{one.url}: {one.lost or f'does not have {version}'}" for one in self.all)
        return f"no replica is left to ask: {reasons}. Start them again; the run goes on from its last checkpoint."

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin it in the background."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def results(self, futures: Sequence[Future[T]]) -> list[T]:
        """Wait for all of them; the first error ends the others. Raises Stopped when the run is asked to stop."""
        try:
            while True:
                check()
                done, waiting = wait(futures, timeout=_LOOK_EVERY, return_when=FIRST_EXCEPTION)
                for one in done:
                    one.result()  # raises what it ended with
                if not waiting:
                    return [one.result() for one in futures]
        except BaseException:
            for one in futures:
                one.cancel()
            raise

    def close(self, farewell: Callable[[Replica], Coroutine[Any, Any, None]]) -> None:
        """End whatever is under way, say farewell to those that are up, and leave nothing running."""
        self.start(self._end(farewell)).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self, farewell: Callable[[Replica], Coroutine[Any, Any, None]]) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        up = [replica for replica in self.all if replica.lost is None]
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*map(farewell, up), return_exceptions=True), FAREWELL)
        await self._client.aclose()
