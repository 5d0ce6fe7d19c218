"""What a program is worth does not depend on what else the machine had to do: its memory, its processor, its time for tidying up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from signal import SIGCONT, SIGKILL, SIGSTOP

import pytest
from cells import inside

from gemma_grpo.reward.sandbox import running
from gemma_grpo.reward.sandbox.running import Limits, Outcome, run_program, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"programs cannot be shut in here: {why_not()}")
SLOW = "import time\ntime.sleep(2)"


@contextmanager
def meanwhile(act: Callable[[list[int]], bool]) -> Iterator[threading.Event]:
    """Hand the sandbox's processes (supervisor, init, program) to `act` until it says that it is done."""
    over, done = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.is_set():
            if len(seen := inside()) == 3 and act(seen):
                done.set()
                return
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield done
    finally:
        over.set()
        watcher.join()


def killed(seen: list[int]) -> bool:
    with suppress(ProcessLookupError):
        os.kill(seen[2], SIGKILL)
        return True
    return False


def test_a_program_that_a_machine_short_of_memory_killed_is_run_again() -> None:
    with meanwhile(killed) as done:
        outcome = run_program(SLOW, ["6 * 7"])
    assert done.is_set()
    assert (outcome.kind, outcome.values) == ("ended", {0: 42})


def test_a_program_that_kills_itself_is_told_after_the_last_attempt() -> None:
    outcome = run_program("import os\nos.kill(os.getpid(), 9)", ["1"])
    assert outcome == Outcome("crash", "SIGKILL")


def test_what_it_was_shut_in_with_may_be_slow_to_go() -> None:
    """The supervisor stands still from before the program's end until 6 s after it, as under load when namespaces are taken down."""

    def stop(seen: list[int]) -> bool:
        os.kill(seen[0], SIGSTOP)
        threading.Timer(8.0, os.kill, (seen[0], SIGCONT)).start()
        return True

    with meanwhile(stop) as done:
        outcome = run_program(SLOW, ["6 * 7"])
    assert done.is_set()
    assert (outcome.kind, outcome.values) == ("ended", {0: 42})


def test_time_in_which_nobody_watched_is_not_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look comes 10 s after the one before, on a clock that runs fast: a program of two seconds has them none the less."""
    began = time.monotonic()
    looks = 0

    def fast() -> float:
        nonlocal looks
        looks += 1
        return began + 10.0 * looks

    monkeypatch.setattr(running.time, "monotonic", fast)
    outcome = run_program(SLOW, ["6 * 7"], Limits(seconds=20.0))
    assert (outcome.kind, outcome.values) == ("ended", {0: 42})


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_crowd_of_programs_all_end_alike(count: int) -> None:
    """Of a thousand, seven once got nothing for three right answers: their supervisor looked for a file while init moved the root."""
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda _: run_program("def answer(x):\n    return x.upper()", ["answer('a')"]), range(count)))
    assert [one for one in outcomes if one != Outcome("ended", values={0: "A"})] == []
