"""The ranks: shares and exchanges, and that all end alike when one fails, is stopped, is killed or is frozen."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import ended, start_ranks

from gemma_grpo import distributed

BEGIN = """
import json, os, signal, sys, time
import torch
from gemma_grpo import distributed as d, stopping, watchdog
"""


def values(code: str, world: int) -> list[object]:
    """What each rank prints as JSON."""
    found = ended(start_ranks(f"{BEGIN}\nwith d.joined(60):\n" + "".join(f"    {line}\n" for line in code.splitlines()), world))
    assert [one[0] for one in found] == [0] * world, found
    return [json.loads(one[1]) for one in found]


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_every_item_is_somebodys_and_loads_are_even(costs: list[int], count: int) -> None:
    found = distributed.shares(costs, count)
    assert sorted(item for items in found for item in items) == list(range(len(costs)))
    loads = [sum(costs[item] for item in items) for items in found]
    assert max(loads) - min(loads) <= max(costs, default=0)  # else the last item given to the fullest would have gone to another


def test_alone_there_is_nothing_to_exchange() -> None:
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    assert distributed.share([3, 1, 2]) == [0, 1, 2]
    assert distributed.gather({"a": 1}, "x") == [{"a": 1}]
    with distributed.joined(1), distributed.together("x"):
        distributed.meet("x")


@pytest.mark.parametrize("world", [2, 3])
def test_what_is_exchanged_is_the_same_everywhere(world: int) -> None:
    code = """
t, u, n = torch.full((3, 2), float(10 ** d.rank())), torch.tensor([0.1 * (d.rank() + 1)]), torch.tensor([d.rank(), 1])
d.sum_([t, n, u], "sums")
print(json.dumps([t.tolist(), n.tolist(), u.item().hex(), d.gather({"rank": d.rank(), "x": "a" * d.rank(), "f": 0.1}, "things"),
                  d.from_main(d.rank(), "one"), d.share([5, 4, 3, 2, 1, 1])]))
"""
    found = values(code, world)
    total = sum(10**number for number in range(world))
    first = found[0]
    assert first[0] == [[total, total]] * 3  # type: ignore[index]
    assert first[1] == [sum(range(world)), world]  # type: ignore[index]
    assert first[3] == [{"rank": number, "x": "a" * number, "f": 0.1} for number in range(world)]  # type: ignore[index]
    assert all(one[:5] == first[:5] for one in found)  # type: ignore[index]
    assert sorted(item for one in found for item in one[5]) == [0, 1, 2, 3, 4, 5]  # type: ignore[index]


FAILING = """
with d.joined(60):
    d.meet("before")
    with watchdog.phase("rollout", "step 3"), d.together("sampling"):
        if d.rank() == 1:
            raise ValueError("the reward is broken")
        time.sleep(0.2)
    print("went on")
"""


def test_an_error_of_one_ends_all_with_its_words() -> None:
    found = ended(start_ranks(BEGIN + FAILING, 3))
    assert all(code == 1 for code, _, _ in found)
    assert not any(out for _, out, _ in found)
    assert "ValueError: the reward is broken" in found[1][2]
    for number in (0, 2):
        assert "RankError: rank 1 failed: ValueError: the reward is broken" in found[number][2]


OUTSIDE = """
with d.joined(60):
    d.meet("before")
    if d.rank() == 0:
        raise ValueError("between two exchanges")
    d.gather(1, "things")
    print("went on")
"""


def test_an_error_between_exchanges_ends_all_too() -> None:
    found = ended(start_ranks(BEGIN + OUTSIDE, 2))
    assert [code for code, _, _ in found] == [1, 1]
    assert "RankError: rank 0 failed: ValueError: between two exchanges" in found[1][2]


STOPPING = """
with stopping.listening(), d.joined(60):
    d.meet("before")
    print("ready", flush=True)
    try:
        while True:
            with d.together("work"):
                stopping.check()
                time.sleep(0.05)
    except stopping.Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(75)
"""


@pytest.mark.parametrize("asked", [0, 1])
def test_one_that_is_asked_to_stop_stops_all_at_the_same_place(asked: int) -> None:
    ranks = start_ranks(BEGIN + STOPPING, 2)
    for one in ranks:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    ranks[asked].send_signal(signal.SIGTERM)
    found = ended(ranks, 30)
    assert [code for code, _, _ in found] == [75, 75]
    assert {out for _, out, _ in found} == {"by SIGTERM\n"}


WORKING = """
with stopping.listening(), d.joined(float(sys.argv[1])):
    d.meet("before")
    print(os.getpid(), flush=True)
    with watchdog.phase("rollout", "step 3"):
        for n in range(10 ** 9):
            d.gather(n, "sampling")
            time.sleep(0.02)
"""


@pytest.mark.parametrize("frozen", [1, 2])
def test_one_that_is_frozen_is_named_with_what_the_others_did(frozen: int) -> None:
    ranks = start_ranks(BEGIN + WORKING, 3, arguments=["3"])
    for one in ranks:
        assert one.stdout is not None
        one.stdout.readline()
    began = time.monotonic()
    os.kill(ranks[frozen].pid, signal.SIGSTOP)
    others = [one for number, one in enumerate(ranks) if number != frozen]
    for one in others:
        one.wait(20)
    took = time.monotonic() - began
    ranks[frozen].kill()
    for one in others:
        _, err = one.communicate()
        assert f"RankError: rank {frozen} did not answer for 3 s; the others were at sampling of step 3" in err
    assert 3 <= took < 6 + distributed.GRACE


def test_ranks_that_read_other_things_are_told() -> None:
    code = 'with d.joined(60):\n    d.agree("a" if d.rank() else "b", "dataset")\n'
    for code_, _, err in ended(start_ranks(BEGIN + code, 2)):
        assert code_ == 1
        assert "rank 1 has another dataset than rank 0" in err


def test_one_process_may_join_several_times() -> None:
    code = """
import itertools
found = []
for n in range(3):
    with d.joined(60):
        found.append(d.gather([n, d.rank()], "things"))
print(json.dumps(found))
"""
    found = ended(start_ranks(BEGIN + code, 2), 60)
    assert [one[0] for one in found] == [0, 0], found
    assert [json.loads(out) for _, out, _ in found] == [[[[n, 0], [n, 1]] for n in range(3)]] * 2


ENDED_FOR_ANOTHER = """
with stopping.listening(), d.joined(60):
    d.meet("before")
    print(os.getpid(), flush=True)
    with d.together("reward"):
        if d.rank() == 1:
            raise ValueError("the reward is broken")
        for _ in range(600):
            stopping.check()
            time.sleep(0.05)
"""


def test_who_is_asked_to_stop_because_another_failed_says_so() -> None:
    ranks = start_ranks(BEGIN + ENDED_FOR_ANOTHER, 2)
    assert ranks[0].stdout is not None
    ranks[0].stdout.readline()
    ranks[1].wait(30)
    ranks[0].send_signal(signal.SIGTERM)  # as torchrun's agent does
    found = ended(ranks, 30)
    assert [code for code, _, _ in found] == [1, 1]
    assert "RankError: rank 1 failed: ValueError: the reward is broken" in found[0][2]
