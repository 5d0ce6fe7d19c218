"""What this machine can do at most, measured on the run's own device and dtype: operations and bytes a second.

Owns the two measurements. What a run needs of them is work.py's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from gemma_grpo.model.memory import explaining_exhaustion, release
from gemma_grpo.profile.work import Work
from gemma_grpo.shapes import ModelShape

REPEATS, REPEAT_SECONDS = 5, 0.05
"""Measurements, of which the best counts; each goes on for at least so long."""
TOKENS = {"cuda": 8192, "cpu": 512}
"""Rows of the matrix products: enough that more do not make them faster."""
MIN_READ, MAX_READ = 2**20, 2**28
"""Bytes read: as many as the base weights have, so that what fits in a cache is measured there; beyond 256 MiB nothing changes."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The best of several measurements."""

    value: float
    """Per second."""
    spread: float
    """How far the worst stayed below the best, as a share of it: above some 0.2 the machine was busy with something else."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a device can do in a second."""

    device: str
    dtype: str
    operations: Ceiling
    """Of matrix products of the model's own widths, in the base's dtype."""
    bytes: Ceiling
    """Read from memory."""

    def seconds(self, work: Work) -> float:
        """The least time that this work takes here."""
        return max(work.operations / self.operations.value, work.bytes / self.bytes.value)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def measure_ceilings(device: torch.device, dtype: torch.dtype, shape: ModelShape, weight_bytes: int) -> Ceilings:
    """Measure for about a second. Draws no number from the run's generators, and keeps no memory.

    Raises DoesNotFitError where there is no room for it.
    """
    with explaining_exhaustion(f"out of memory on {device} while measuring it for --profile. Run without --profile."), torch.no_grad():
        operations = max((_products(device, dtype, *sizes) for sizes in _widths(shape)), key=lambda ceiling: ceiling.value)
        reading = _reading(device, min(max(weight_bytes, MIN_READ), MAX_READ))
    release(device)
    return Ceilings(device_name(device), str(dtype).removeprefix("torch."), operations, reading)


def device_name(device: torch.device) -> str:
    """The card's name, or the CPU with as many threads as torch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def synchronised_clock(device: torch.device) -> Callable[[], float]:
    """time.perf_counter, read once everything begun on the device is done."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def _widths(shape: ModelShape) -> set[tuple[int, int]]:
    """Inputs and outputs of the feed-forward half's layers, where most of the work is."""
    return {shape.linear_sizes["up_proj"], shape.linear_sizes["down_proj"]}


def _products(device: torch.device, dtype: torch.dtype, inputs: int, outputs: int) -> Ceiling:
    generator = torch.Generator(device).manual_seed(0)  # random: a card draws less power, and runs faster, on zeros
    tokens = torch.randn((TOKENS[device.type], inputs), generator=generator, device=device).to(dtype)
    weight = torch.randn((outputs, inputs), generator=generator, device=device).to(dtype)
    return best_rate(device, lambda: linear(tokens, weight), 2 * len(tokens) * inputs * outputs)


def _reading(device: torch.device, size: int) -> Ceiling:
    numbers = torch.ones(size // 4, device=device)
    return best_rate(device, lambda: numbers.sum(), 4 * len(numbers))


def best_rate(device: torch.device, work: Callable[[], object], amount: int) -> Ceiling:
    """What of `amount` is done in a second at best, when each call of `work` does so much."""
    clock = synchronised_clock(device)

    def seconds(times: int) -> float:
        started = clock()
        for _ in range(times):
            work()
        return clock() - started

    seconds(1)  # the first one chooses kernels and makes room
    times = max(1, round(REPEAT_SECONDS / max(seconds(3) / 3, 1e-6)))
    rates = [amount * times / seconds(times) for _ in range(REPEATS)]
    return Ceiling(max(rates), 1 - min(rates) / max(rates))
