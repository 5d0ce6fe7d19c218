"""The paper model of docs/scaling.md: its laws, and that the document has its tables."""

from __future__ import annotations

import pytest

from bench.scaling import CONFIG, MODELS, TABLE, Machine, gathered, groups_of, step, tables
from gemma_grpo.profile.work import Lengths, Work
from gemma_grpo.shapes import known_shapes

SHAPE = known_shapes()[MODELS[0]]


def test_the_document_has_the_tables() -> None:
    text = TABLE.path.read_text(encoding="utf-8")
    assert TABLE.filled(text, tables()) == text, "run python -m bench.scaling"


def test_a_pass_takes_its_operations_or_its_bytes() -> None:
    machine = Machine("toy", operations=100.0, bytes=10.0, network=1.0, efficiency=0.5)
    assert machine.seconds([Work(100, 1)]) == pytest.approx(100 / 50)
    assert machine.seconds([Work(1, 100)]) == pytest.approx(100 / 10)
    assert machine.seconds([Work(100, 1), Work(1, 100)]) == pytest.approx(12.0)


def test_alone_nobody_waits_and_nothing_is_sent() -> None:
    alone = step(SHAPE, groups_of(16), 1)
    assert (alone.idle, alone.sent) == (pytest.approx(0.0), 0)


def test_equal_groups_leave_nobody_idle_and_a_ring_sends_its_share() -> None:
    equal = [Lengths(100, (40,) * 8)] * 16
    far = Machine("toy", operations=1e15, bytes=1e12, network=1e30)
    two = step(SHAPE, equal, 2, far)
    assert two.idle == pytest.approx(0.0)
    assert two.sent == CONFIG.planning_steps * 4 * SHAPE.lora_parameters(CONFIG.lora)  # 2 (n - 1) / n gradients a pass, n = 2
    uneven = step(SHAPE, [*equal[:15], Lengths(100, (200,) * 8)], 2, far)
    assert uneven.idle > 0.01


def test_more_ranks_are_never_slower_and_never_faster_than_their_number() -> None:
    groups = groups_of(16)
    seconds = [step(SHAPE, groups, ranks).seconds for ranks in (1, 2, 4, 8, 16)]
    assert seconds == sorted(seconds, reverse=True)
    assert all(seconds[0] / now <= 2**power for power, now in enumerate(seconds))


def test_a_shared_out_base_is_received_but_for_the_own_part() -> None:
    shape = known_shapes()["google/gemma-3-27b-it"]
    layers = 62 * 412_898_560 + 5376  # numbers of a layer as in tests/test_planner_sharding.py, and the last norm
    assert gathered(shape, 1) == 0
    assert gathered(shape, 4) == pytest.approx(2 * layers * 3 / 4)
