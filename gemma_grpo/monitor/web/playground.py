"""The playground: base against tuned on one prompt, by a process of its own that holds the model. One generation at a time.

Loads no torch: the model lives in grpo/play_worker.py's process, which is started when it is first asked, ended when nobody asks for a
while, and killed when a reply takes too long.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gemma_grpo.monitor.choices import FINAL, chosen
from gemma_grpo.monitor.votes import append_vote

MOST_WAITING = 8
LONGEST = 300.0
"""Seconds for both replies; loading comes on top."""
LOADING = 900.0
IDLE = 600.0
"""Seconds after which the model is let go."""
MOST_UNVOTED = 64
_LONGEST_LINE = 2**22


class BusyError(Exception):
    """Too many wait already."""


class Turn(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["user", "assistant"]
    content: str = Field(max_length=32_000)


class Question(BaseModel):
    """What a page may ask."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    messages: list[Turn] = Field(min_length=1, max_length=64)
    checkpoint: str = Field(FINAL, max_length=64)
    seed: int = Field(0, ge=0, lt=2**31)
    max_tokens: int | None = Field(None, ge=1, le=4096)
    temperature: float | None = Field(None, ge=0, le=100)
    blind: bool = False
    beside: bool = False
    """Beside a training: load a copy of the model on the CPU."""


class Vote(BaseModel):
    """What a person preferred of two replies whose sides were not told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pair: str = Field(max_length=64)
    choice: Literal["first", "second", "tie"]


class _Worker:
    """One process with one run's model."""

    def __init__(self, run: Path, beside: bool, process: asyncio.subprocess.Process) -> None:
        self.run, self.beside, self.process = run, beside, process

    @classmethod
    async def start(cls, run: Path, question: Question) -> _Worker:
        """Raises ValueError with the reason where the run cannot be loaded."""
        words = ["-m", "gemma_grpo.grpo.play_worker", str(run), question.checkpoint, *(["--beside"] if question.beside else [])]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(sys.executable, *words, stdin=pipe, stdout=pipe, limit=_LONGEST_LINE)
        worker = cls(run, question.beside, process)
        try:
            told = await asyncio.wait_for(worker.hear(), LOADING)
        except BaseException:
            worker.kill()
            raise
        if "ready" not in told:
            worker.kill()
            raise ValueError(str(told.get("refused", "the model's process ended while it loaded; the terminal says why.")))
        return worker

    @property
    def lives(self) -> bool:
        return self.process.returncode is None

    async def hear(self) -> Mapping[str, Any]:
        """What it says next; empty when it has ended."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        told = json.loads(line) if line else {}
        return told if isinstance(told, dict) else {}

    async def say(self, request: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        await self.process.stdin.drain()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()


class Playground:
    """Asks one worker at a time, for whoever comes first."""

    def __init__(self) -> None:
        self._turn, self._asked, self._number = asyncio.Lock(), 0, 0
        self._worker: _Worker | None = None
        self._unvoted: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._unvoted_pair = ""
        self._last = time.monotonic()
        self._idling: asyncio.Task[None] | None = None

    def check(self, run: Path, question: Question) -> None:
        """Raises BusyError, or ValueError for an adapter that is not there."""
        chosen(run, question.checkpoint)
        if self._asked > MOST_WAITING:  # one of them is being answered
            raise BusyError(f"{MOST_WAITING} questions wait already. Ask again when some are answered.")

    async def answer(self, run: Path, question: Question) -> AsyncIterator[dict[str, Any]]:
        """What happens, as it does: "waiting", "loading", pieces and replies of both sides, "done" or "error"."""
        self._asked += 1
        try:
            if self._turn.locked():
                yield {"state": f"waiting for {self._asked - 1} before"}
            async with self._turn:
                async for told in self._answered(run, question):
                    yield told
        finally:
            self._asked -= 1
            self._last = time.monotonic()

    async def _answered(self, run: Path, question: Question) -> AsyncIterator[dict[str, Any]]:
        try:
            if self._worker is None or not self._worker.lives or self._worker.run != run or self._worker.beside != question.beside:
                yield {"state": "loading the model"}
                await self._load(run, question)
            order = ["base", "tuned"]
            names = {side: side for side in order}
            if question.blind:
                random.SystemRandom().shuffle(order)
                names = dict(zip(order, ("first", "second"), strict=True))
            async for told in self._replies(question, order):
                yield self._shown(told, names, run, question)
        except ValueError as error:
            yield {"error": str(error)}
        except asyncio.TimeoutError:
            self.close()
            yield {"error": f"the replies took longer than {LONGEST:.0f} s and were ended. Ask for fewer tokens."}

    async def _load(self, run: Path, question: Question) -> None:
        self.close()
        self._worker = await _Worker.start(run, question)
        if self._idling is None:
            self._idling = asyncio.create_task(self._let_go_when_idle())

    async def _replies(self, question: Question, order: list[str]) -> AsyncIterator[dict[str, Any]]:
        worker = self._worker
        assert worker is not None
        self._number += 1
        number, ended, deadline = self._number, False, time.monotonic() + LONGEST
        asked = question.model_dump(include={"messages", "checkpoint", "seed", "max_tokens", "temperature"})
        await worker.say({"id": number, "sides": order, **asked})
        try:
            while not ended:
                told = dict(await asyncio.wait_for(worker.hear(), max(0.0, deadline - time.monotonic())))
                if not told:
                    raise ValueError("the model's process ended; the terminal says why.")
                if told.pop("id", None) != number:
                    continue  # of a question that was called off
                ended = "done" in told or "error" in told
                yield told
        finally:
            if not ended and worker.lives:  # whoever asked has gone
                with suppress(OSError):
                    await worker.say({"cancel": number})

    def _shown(self, told: dict[str, Any], names: Mapping[str, str], run: Path, question: Question) -> dict[str, Any]:
        """What the page is told: in blind mode neither who speaks nor what only one side can have."""
        if not question.blind or "error" in told:
            return told
        if "done" in told:
            return {**told, "pair": self._unvoted_pair}
        side = told["side"]
        if "reply" in told:
            self._keep(side, told, names, run, question)
            told = {**told, "reply": {name: told["reply"][name] for name in ("text", "finish", "length", "left_out")}, "opinion": None}
        return {**told, "side": names[side]}

    def _keep(self, side: str, told: dict[str, Any], names: Mapping[str, str], run: Path, question: Question) -> None:
        """Remember a blind reply until the pair is voted on."""
        if names[side] == "first":
            self._unvoted_pair = secrets.token_urlsafe(12)
            self._unvoted[self._unvoted_pair] = {"run": run, "question": question, "names": dict(names), "replies": {}}
            while len(self._unvoted) > MOST_UNVOTED:
                self._unvoted.popitem(last=False)
        self._unvoted[self._unvoted_pair]["replies"][side] = {"reply": told["reply"], "opinion": told["opinion"]}

    def vote(self, run: Path, vote: Vote) -> dict[str, Any]:
        """Count a vote, and tell who was who. Raises LookupError for a pair that is not open, OSError where the run cannot be written."""
        kept = self._unvoted.get(vote.pair)
        if kept is None or kept["run"] != run or len(kept["replies"]) != 2:
            raise LookupError("that pair is not open: it was voted on already, or it is too old.")
        side_of = {name: side for side, name in kept["names"].items()}
        question: Question = kept["question"]
        append_vote(
            run,
            {
                "time": round(time.time(), 3),
                "choice": side_of.get(vote.choice, "tie"),
                "first": side_of["first"],
                **question.model_dump(include={"messages", "checkpoint", "seed", "max_tokens", "temperature"}),
                "texts": {side: one["reply"]["text"] for side, one in kept["replies"].items()},
            },
        )
        del self._unvoted[vote.pair]
        return {"sides": side_of, "replies": kept["replies"]}

    async def _let_go_when_idle(self) -> None:
        while self._worker is not None:
            await asyncio.sleep(max(1.0, IDLE - (time.monotonic() - self._last)))
            if not self._asked and time.monotonic() - self._last >= IDLE:
                self.close()
        self._idling = None

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None
