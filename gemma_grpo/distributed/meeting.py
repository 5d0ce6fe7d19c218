"""Where ranks meet: who takes part, and that an error, a stop, or a rank that is gone or frozen ends all of them at the same place.

Before anything is exchanged each rank says over a key-value store that it has come, or why it does not, and rank 0 says to all whether to
go on. The exchange itself, which nobody can be called back from, begins only when all are there.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from gemma_grpo import stopping, watchdog
from gemma_grpo.launched import world_size

STARTING = 120.0
"""Seconds, at least, that ranks wait for each other at the start: a machine may take long to load its libraries."""
GRACE = 3.0
"""Seconds that a rank which ends waits for the others to have heard why."""
_SLICE = 0.1
"""Seconds between two looks at whether this rank was asked to stop."""
_SLOWEST_LOOK = 0.01
"""Seconds."""
_LONGEST_TEXT = 4000


class RankError(RuntimeError):
    """Another rank has ended the work: it failed, or does not answer. The message names it."""


@dataclass
class _Ranks:
    rank: int = 0
    world: int = 1
    store: Any = None
    timeout: float = 0.0
    meetings: int = 0
    waited: float = 0.0
    left: bool = False
    sharded: Any = None
    """The layers that are shared out (sharding.py), if any are."""


_ranks = _Ranks()


def rank() -> int:
    """This process's number among the ranks, from 0."""
    return _ranks.rank


def world() -> int:
    """How many ranks there are."""
    return _ranks.world


def is_main() -> bool:
    """Whether this rank is the one that writes and speaks."""
    return _ranks.rank == 0


def seconds_waited() -> float:
    """Seconds that this rank has waited for others so far."""
    return _ranks.waited


@contextmanager
def joined(timeout: float) -> Iterator[None]:
    """Take part in the run whose ranks a launcher started, told by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; alone without one.

    Who comes more than `timeout` seconds later to a meeting than the others is given up. Joining again inside changes nothing.
    """
    if world_size() == 1 or _ranks.world > 1:
        yield
        return
    _join(timeout)
    try:
        yield
    except BaseException as error:
        leave(error)
        raise
    finally:
        _part()


def _join(timeout: float) -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    starting = max(timeout, STARTING)
    store, _ranks.rank, _ranks.world = _meeting_place(timedelta(seconds=starting))
    start = _this_start(store, starting)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=PrefixStore(f"{start}/torch", store),
        rank=_ranks.rank,
        world_size=_ranks.world,
        timeout=timedelta(seconds=timeout),
    )
    _ranks.store, _ranks.timeout = PrefixStore(f"{start}/gemma-grpo", store), timeout
    _ranks.store.set(f"host/{_ranks.rank}", socket.gethostname())


@cache
def _meeting_place(patience: timedelta) -> tuple[Any, int, int]:
    """The store, this rank and how many there are; once in a process, as rank 0 may hold the store itself, for several trainings."""
    found: tuple[Any, int, int] = next(rendezvous("env://", timeout=patience))
    return found


def _this_start(store: Any, timeout: float) -> str:
    """A name for this start of the ranks that all of them know, in a store that may still hold what an earlier start left there.

    Each rank says a word that nobody can have said before; rank 0 names the start and repeats the words it heard. Whoever finds its own
    word there says yes to the name; once all have, the name holds. Raises RankError where they do not come together in time.
    """
    word, said, deadline = secrets.token_hex(8), "", time.monotonic() + timeout
    numbers = [str(number) for number in range(_ranks.world)]
    store.set(f"word/{_ranks.rank}", word)
    name, words = "", [""]
    while time.monotonic() < deadline:
        if is_main() and store.check([f"word/{number}" for number in numbers]):
            heard = [store.get(f"word/{number}").decode() for number in numbers]
            if heard != words:
                name, words = secrets.token_hex(8), heard
                store.set("start", json.dumps([name, words]))
        if store.check(["start"]):
            told, repeated = json.loads(store.get("start"))
            if told != said and repeated[_ranks.rank : _ranks.rank + 1] == [word]:
                said = told
                store.set(f"yes/{told}/{_ranks.rank}", "")
            if said == told and store.check([f"yes/{told}/{number}" for number in numbers]):
                return said
        time.sleep(0.01)
    raise RankError(f"not all of the {_ranks.world} ranks came within {timeout:g} s. Look at what they say.")


def _part() -> None:
    global _ranks
    _ranks = _Ranks()
    if dist.is_initialized():
        dist.destroy_process_group()


def is_sharded(layers: Any = None) -> bool:
    """Whether ranks share out a base's layers (these ones, if given): a pass of one is then a pass of all."""
    return _ranks.sharded is not None and layers in (None, _ranks.sharded)


def base_for_sampling() -> AbstractContextManager[None]:
    """Around sampling by all ranks: with the whole base, where it is shared out and was wanted whole."""
    return nullcontext() if _ranks.sharded is None else _ranks.sharded.sampling()


def set_sharded(layers: Any) -> None:
    """From now on who has done its share of something goes on gathering (`layers.join`) until all have."""
    _ranks.sharded = layers


# ---- meeting


@contextmanager
def together(what: str) -> Iterator[None]:
    """Around a share of the work: whoever fails in it tells the others, who raise RankError, or Stopped where it was asked to stop."""
    try:
        yield
        if _ranks.sharded is not None:
            _ranks.sharded.join()
    except GeneratorExit:  # whoever took its results has ended, and will say why
        raise
    except BaseException as error:
        if _ranks.sharded is not None and _is_broken_connection(error):
            raise _who_broke(what) from error
        leave(error)
        reason = _failure_behind(error)
        if reason is not None:
            raise reason from error
        raise
    meet(what)


def meet(what: str) -> None:
    """Wait until all ranks have come here. Raises RankError or Stopped, on all of them alike, where one does not come."""
    if _ranks.world == 1:
        return
    began = time.monotonic()
    try:
        _say({"kind": "here"})
        verdict = _decide(what) if is_main() else _await_verdict(what)
    except dist.DistNetworkError as error:
        _ranks.left = True
        raise RankError(f"whoever started the ranks is gone, {_at(what)}: {error}") from error
    _ranks.meetings += 1
    _ranks.waited += time.monotonic() - began
    if verdict["kind"] != "go":
        _ranks.left = True
        raise _error(verdict)


def leave(error: BaseException) -> None:
    """Tell the others that this rank does not come to the next meeting, and why. What they ended themselves they are not told again."""
    if _ranks.world == 1 or _ranks.left:
        return
    _ranks.left = True
    stopped = isinstance(error, stopping.Stopped)
    text = str(error) if stopped else f"failed: {type(error).__name__}: {error}"
    said = {"kind": "stopped" if stopped else "failed", "rank": _ranks.rank, "text": text[:_LONGEST_TEXT]}
    with suppress(dist.DistError):  # whoever held the store is gone: there is nobody left to tell
        _say(said)
        if is_main():
            _tell(said)
        _wait([_key("verdict")] if not is_main() else [_key(number) for number in range(1, _ranks.world)], GRACE)


def _failure_behind(error: BaseException) -> RankError | None:
    """What another rank failed with, where this one was asked to stop for it: whoever started the ranks then ends all of them."""
    if _ranks.world == 1 or not isinstance(error, stopping.Stopped):
        return None
    with suppress(dist.DistError):
        for number in range(_ranks.world):
            said = json.loads(_ranks.store.get(_key(number))) if _ranks.store.check([_key(number)]) else {}
            if said.get("kind") == "failed":
                return RankError(_named(number, said["text"]))
    return None


def _named(number: int, text: str) -> str:
    """With its host, where that is another one's."""
    host = ""
    with suppress(dist.DistError):
        if _ranks.store.check([f"host/{number}"]):
            host = _ranks.store.get(f"host/{number}").decode()
    return f"rank {number}{f' on {host}' if host not in ('', socket.gethostname()) else ''} {text}"


def _error(verdict: dict[str, Any]) -> BaseException:
    if verdict["kind"] == "stopped":
        return stopping.Stopped(verdict["text"])
    return RankError(_named(verdict["rank"], verdict["text"]))


def _key(name: object) -> str:
    return f"{_ranks.meetings}/{name}"


def _say(status: dict[str, Any]) -> None:
    _ranks.store.set(_key(_ranks.rank), json.dumps(status))


def _tell(verdict: dict[str, Any]) -> None:
    _ranks.store.set(_key("verdict"), json.dumps(verdict))


def _decide(what: str) -> dict[str, Any]:
    """Rank 0: hear each of the others, and tell all what follows."""
    verdict = _heard(what)
    if verdict["kind"] == "go" and (reason := stopping.requested()) is not None:
        verdict = {"kind": "stopped", "rank": 0, "text": reason}
    _tell(verdict)
    past = _ranks.meetings - 2  # everybody has read what was said there
    for name in (*range(_ranks.world), "verdict") if past >= 0 else ():
        _ranks.store.delete_key(f"{past}/{name}")
    return verdict


def _heard(what: str, *, broken: bool = False) -> dict[str, Any]:
    """The verdict; where an exchange is `broken`, who does not come is gone, and whoever started the ranks asks the others to stop."""
    keys = [_key(number) for number in range(1, _ranks.world)]
    deadline, asked = time.monotonic() + _ranks.timeout, False
    while not _wait(keys, _SLICE):
        reason = stopping.requested()
        if reason is not None and not asked:  # the others may be busy, or gone: whenever they come, they will read it
            asked, deadline = True, min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            late = [number for number, key in enumerate(keys, start=1) if not _ranks.store.check([key])]
            if late and asked and not broken:
                return {"kind": "stopped", "rank": 0, "text": reason}
            if late:
                return _silent(late, what) if not asked else {"kind": "failed", "rank": late[0], "text": f"is gone, {_at(what)}"}
    said = [json.loads(text) for text in _ranks.store.multi_get(keys)]
    ended = sorted((one for one in said if one["kind"] != "here"), key=lambda one: one["kind"])  # "failed" before "stopped"
    return ended[0] if ended else {"kind": "go"}


def _silent(late: Sequence[int], what: str) -> dict[str, Any]:
    others = f", nor did {', '.join(map(str, late[1:]))}" if late[1:] else ""
    text = f"did not answer for {_ranks.timeout:g} s{others}; the others were at {_at(what)}"
    return {"kind": "failed", "rank": late[0], "text": text}


def _at(what: str) -> str:
    return " of ".join(filter(None, (what, watchdog.detail())))


def _await_verdict(what: str) -> dict[str, Any]:
    deadline, reason = time.monotonic() + 2 * _ranks.timeout, None  # twice: rank 0 may itself wait for another one
    while not _wait([_key("verdict")], _SLICE):
        if reason is None and (reason := stopping.requested()) is not None:
            # rank 0 hears of it, and says it to all; it has no more than GRACE for that, as it may be gone itself
            deadline = time.monotonic() + GRACE
            _say({"kind": "stopped", "rank": _ranks.rank, "text": reason})
        if time.monotonic() > deadline:
            silent = f"did not answer for {2 * _ranks.timeout:g} s; rank {_ranks.rank} was at {_at(what)}"
            return {"kind": "failed", "rank": 0, "text": silent} if reason is None else {"kind": "stopped", "text": reason}
    found: dict[str, Any] = json.loads(_ranks.store.get(_key("verdict")))
    return found


def _wait(keys: Sequence[str], seconds: float) -> bool:
    """Whether all keys are there before so many seconds have gone by. It asks again and again: the store's own wait hears no signal."""
    began = time.monotonic()
    while not _ranks.store.check(list(keys)):
        waited = time.monotonic() - began
        if waited > seconds:
            return False
        time.sleep(min(_SLOWEST_LOOK, waited / 20))
    return True


@contextmanager
def exchanging(what: str) -> Iterator[None]:
    """Around an exchange of those who have met. Where it breaks, whoever does not come to a last meeting is who broke it."""
    meet(what)
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too, but nobody else's doing
        raise
    except RuntimeError as error:  # of gloo and NCCL: a connection was closed, or their own timeout is over
        raise _who_broke(what, f": {error}") from error


def _is_broken_connection(error: BaseException) -> bool:
    """Whether gloo or NCCL ended a gathering in the middle of a pass."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _who_broke(what: str, why: str = "") -> BaseException:
    """After an exchange that broke: whoever does not come to a last meeting."""
    _ranks.left = True
    _say({"kind": "here"})
    verdict = _heard(what, broken=True) if is_main() else None
    if verdict is not None:
        _tell(verdict)
    found = verdict or _await_verdict(what)
    return _error(found) if found["kind"] != "go" else RankError(f"an exchange failed, {_at(what)}{why}")
