"""Laws of the machine's ceilings: the best of several, nothing drawn and nothing kept, and the larger of two times."""

from __future__ import annotations

import time

import pytest
import torch

from gemma_grpo.profile.ceilings import REPEATS, Ceiling, Ceilings, best_rate, measure_ceilings, synchronised_clock
from gemma_grpo.profile.work import Work
from gemma_grpo.shapes import MINIATURE, shape_of

CPU = torch.device("cpu")


def test_work_takes_the_larger_of_its_two_times() -> None:
    ceilings = Ceilings("CPU", "float32", operations=Ceiling(100.0, 0.0), bytes=Ceiling(10.0, 0.0))
    assert ceilings.seconds(Work(operations=200, bytes=5)) == 2.0
    assert ceilings.seconds(Work(operations=200, bytes=30)) == 3.0


def test_the_best_of_the_repeats_counts_and_the_worst_is_told() -> None:
    pauses = [0.0, *[0.06] * 3, *[0.2] * (REPEATS - 1), 0.1]  # one to warm up, three to see how long it takes, one call a repeat

    def work() -> None:
        time.sleep(pauses.pop(0))

    ceiling = best_rate(CPU, work, amount=3)
    assert pauses == []
    assert 3 / 0.2 < ceiling.value <= 3 / 0.1  # a pause is never shorter than asked for
    assert 0.3 < ceiling.spread < 1


def test_measuring_draws_nothing_from_the_run_and_takes_seconds_at_most() -> None:
    before, started = torch.get_rng_state(), time.perf_counter()
    ceilings = measure_ceilings(CPU, torch.float32, shape_of(MINIATURE), 7_000_000)
    assert time.perf_counter() - started < 60  # about one, on a machine that does nothing else
    assert torch.equal(torch.get_rng_state(), before)
    assert ceilings.dtype == "float32"
    assert ceilings.device.startswith("CPU, ")
    for ceiling in (ceilings.operations, ceilings.bytes):
        assert ceiling.value > 1e8
        assert 0 <= ceiling.spread < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_clock_waits_for_the_device() -> None:
    device = torch.device("cuda")
    matrix = torch.randn(8192, 8192, device=device)
    clock, begun, ended = synchronised_clock(device), torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    started = clock()
    begun.record()
    for _ in range(20):
        matrix = (matrix @ matrix).sign()
    ended.record()
    passed = clock() - started
    assert passed >= begun.elapsed_time(ended) / 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_is_measured_in_the_dtype_of_the_run() -> None:
    ceilings = measure_ceilings(torch.device("cuda"), torch.bfloat16, shape_of("google/gemma-3-4b-it"), 8 * 10**9)
    assert ceilings.device == torch.cuda.get_device_name()
    assert ceilings.operations.value > 1e12
    assert ceilings.bytes.value > 5e10
