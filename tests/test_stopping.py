"""A first signal is a request, noticed between two pieces of work; a second one ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from gemma_grpo import stopping
from gemma_grpo.stopping import EXIT_CODE, SIGNALS, Stopped, check, held, interruptible, listening


@pytest.fixture(autouse=True)
def handlers_stay() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noticed_at_the_next_check_and_not_before(number: signal.Signals) -> None:
    done = []

    def work() -> None:
        check()
        os.kill(os.getpid(), number)
        done.append("the piece of work")
        check()
        done.append("the next one")

    with listening(), pytest.raises(Stopped, match=f"by {number.name}"):
        work()
    assert done == ["the piece of work"]
    check()  # a request ends with those who listened


def test_what_others_take_part_in_comes_to_its_end() -> None:
    with listening():
        with held(), held():
            os.kill(os.getpid(), signal.SIGTERM)
            check()
        with pytest.raises(Stopped, match="by SIGTERM"):
            check()


def test_other_peoples_code_is_left_at_once_and_cannot_keep_the_run_going() -> None:
    def theirs() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except Exception:
            time.sleep(60)

    started = time.monotonic()
    with pytest.raises(Stopped), listening(), interruptible():
        theirs()
    assert time.monotonic() - started < 30


def test_a_request_from_before_is_noticed_on_the_way_into_other_peoples_code() -> None:
    with listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped), interruptible():
            pytest.fail("their code was begun")


def test_time_that_is_up_is_a_request_too(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: now))
    with listening(max_minutes=2):
        now = 219.9
        check()
        now = 220.0
        with pytest.raises(Stopped, match="its time is up"):
            check()


def test_a_thread_hears_no_signal_but_has_its_time() -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            with listening(max_minutes=0):
                check()
        except Stopped as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(caught) == 1


def test_a_second_signal_ends_at_once() -> None:
    program = """
import os, signal, time
from gemma_grpo.stopping import interruptible, listening
with listening(), interruptible():
    while True:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except BaseException:
            pass
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == EXIT_CODE
    assert "SIGTERM: stopping after this piece of work; once more ends at once." in done.stderr
    assert "second signal (SIGTERM): ended at once; the last checkpoint is what it was." in done.stderr
