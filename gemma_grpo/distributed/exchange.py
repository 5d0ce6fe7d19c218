"""Shares of the work, and what all ranks then know: sums and values, to the bit the same on each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gemma_grpo.distributed.meeting import RankError, exchanging, is_main, rank, world


def share(costs: Sequence[float]) -> list[int]:
    """Numbers of the items that are this rank's, so that all ranks have about the same cost: the dearest first, to who has least."""
    return shares(costs, world())[rank()]


def shares(costs: Sequence[float], count: int) -> list[list[int]]:
    """The same for every one of `count` ranks."""
    loads, found = [0.0] * count, [list[int]() for _ in range(count)]
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        least = min(range(count), key=loads.__getitem__)
        loads[least] += costs[item]
        found[least].append(item)
    return [sorted(items) for items in found]


def gather(value: Any, what: str) -> list[Any]:
    """What each rank has, by rank, on all of them: JSON values."""
    if world() == 1:
        return [value]
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    with exchanging(what):
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(world())]
        dist.all_gather(sizes, torch.tensor([len(content)]))
        width = int(max(sizes))
        found = [torch.zeros(width, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(found, torch.nn.functional.pad(content, (0, width - len(content))))
    return [json.loads(bytes(one[: int(size)].numpy())) for one, size in zip(found, sizes, strict=True)]


def from_main(value: Any, what: str) -> Any:
    """What rank 0 has, on all ranks: a JSON value."""
    return gather(value if is_main() else None, what)[0]


def sum_(tensors: Sequence[Tensor], what: str) -> None:
    """Replace each tensor by the sum of all ranks', in place; to the bit the same on all of them."""
    if world() == 1:
        return
    kinds = sorted(range(len(tensors)), key=lambda n: (str(tensors[n].dtype), str(tensors[n].device)))
    for _, group in groupby(kinds, key=lambda n: (tensors[n].dtype, tensors[n].device)):
        some = [tensors[n] for n in group]
        flat = torch.cat([tensor.reshape(-1) for tensor in some])
        with exchanging(what):
            dist.all_reduce(flat)
        for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
            tensor.copy_(part.view_as(tensor))


def sum_by_name(values: Mapping[str, float], what: str) -> dict[str, float]:
    """The sums over all ranks, of whatever each of them has a number for."""
    if world() == 1:
        return dict(values)
    total: dict[str, float] = {}
    for found in gather(values, what):  # in the ranks' order, so that all add up alike
        for name, value in found.items():
            total[name] = total.get(name, 0.0) + value
    return total


def copy_from_main(source: Path | None, target: Path, names: Sequence[str]) -> None:
    """Files of rank 0's folder `source` into the folder `target` of every other rank: those of `names` that there are."""
    if world() == 1:
        return
    there = from_main([name for name in names if source is not None and (source / name).is_file()], "sharing files")
    for name in there:
        content = _bytes_from_main((source / name).read_bytes() if source is not None and is_main() else b"")
        if not is_main():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)


def _bytes_from_main(content: bytes) -> bytes:
    size = int(from_main(len(content), "sharing files"))
    buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8) if is_main() and size else torch.zeros(size, dtype=torch.uint8)
    if size:
        with exchanging("sharing files"):
            dist.broadcast(buffer, src=0)
    return bytes(buffer.numpy())


def agree(value: str, what: str) -> None:
    """Raise RankError unless all ranks have the same text; `what` says what it is of."""
    found = gather(value, what)
    other = next((number for number, one in enumerate(found) if one != found[0]), None)
    if other is not None:
        raise RankError(f"rank {other} has another {what} than rank 0. All ranks must read the same files with the same library versions.")
