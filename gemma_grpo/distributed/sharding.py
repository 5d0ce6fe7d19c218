"""A frozen base whose layers are shared out among the ranks (FSDP2): each keeps a part of every layer, and gets the rest when it needs it.

A pass gathers one layer after the other, and gathering is done by all ranks or by none. So before each pass all of them say whether they
make one too; who has done its share gathers along until nobody has any left. Sampling may have the whole base for its time instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from gemma_grpo.distributed.meeting import RankError, exchanging, is_sharded, rank, set_sharded, world

GATHERING = "gathering the base"
PARTED = "the model's base is shared out among ranks that have parted. Load it anew, in a new GRPOTrainer or with GRPOTrainer.from_run."


class Pass(IntEnum):
    """What a rank is about to do with the layers."""

    NONE = 0
    FORWARD = 1
    """Each of them once, in their order."""
    WITH_BACKWARD = 2
    """And once more, from the last to the first."""


class ShardedLayers:
    """The layers of `decoder`, of which this rank keeps its part; what else it has stays whole. Their weights are meta tensors at first.

    After it `layer.to_empty` gives the parts room, `own_part` fills them, and a first pass of all ranks must come before any other.
    """

    def __init__(self, decoder: nn.Module, layers: Sequence[nn.Module], device: torch.device, *, whole_while_sampling: bool) -> None:
        self.whole_while_sampling = whole_while_sampling
        self._whole = False
        mesh = init_device_mesh(device.type, (world(),))
        self.layers: list[FSDPModule] = [fully_shard(layer, mesh=mesh, reshard_after_forward=True) for layer in layers]
        kept = {id(parameter) for layer in layers for parameter in layer.parameters()}
        fully_shard(decoder, mesh=mesh, ignored_params={one for one in decoder.parameters() if id(one) not in kept})
        # said outright, for the first too: torch's own guess of what comes before reaches back into earlier passes, without a backward
        self.layers[0].set_modules_to_backward_prefetch(self.layers[:1])
        for before, after in zip(self.layers, self.layers[1:], strict=False):
            before.set_modules_to_forward_prefetch([after])
            after.set_modules_to_backward_prefetch([before])
        set_sharded(self)

    @property
    def in_layers(self) -> bool:
        """Whether a pass gathers layer by layer now; it must be told before (`begin`)."""
        return not self._whole

    def begin(self, kind: Pass) -> None:
        """Before a pass: wait until each rank makes one too, or gathers along. Nothing where the whole base is here."""
        if self._whole:
            return
        if not is_sharded(self):
            raise RankError(PARTED)
        if self._told(kind) is not kind:
            raise RankError("ranks are about to make passes of different kinds over a base that they share out: this is a bug.")

    def join(self) -> None:
        """Gather along with the ranks that still make passes, until none does."""
        while not self._whole and (kind := self._told(Pass.NONE)) is not Pass.NONE:
            for layer in [*self.layers, *(reversed(self.layers) if kind is Pass.WITH_BACKWARD else ())]:
                layer.unshard()
                layer.reshard()

    def _told(self, kind: Pass) -> Pass:
        """The most that any rank is about to do."""
        found = torch.tensor([int(kind)])
        with exchanging(GATHERING):
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return Pass(int(found))

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """One layer's whole weights, within a pass that takes layer after layer; the next one's are already sent for."""
        if self._whole:
            yield
            return
        self.layers[index].unshard()
        for following in self.layers[index + 1 : index + 2]:
            following.unshard(async_op=True)
        try:
            yield
        finally:
            self.layers[index].reshard()

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Around what all ranks sample: with the whole base where that is wanted. Afterwards each has its part again."""
        if not self.whole_while_sampling:
            yield
            return
        try:
            with exchanging(GATHERING):
                for layer in self.layers:
                    layer.unshard()
            self._keep_gathered(True)
            yield
        finally:
            self._keep_gathered(False)
            for layer in self.layers:
                layer.reshard()

    def _keep_gathered(self, keep: bool) -> None:
        self._whole = keep
        for layer in self.layers:
            layer.set_reshard_after_forward(not keep)


def own_part(parameter: Tensor, weight: Tensor) -> bool:
    """Fill a shared-out parameter with this rank's part of its whole weight; False, and nothing done, where it is not shared out."""
    if not isinstance(parameter, DTensor):
        return False
    parts = weight.chunk(world())  # as FSDP cuts: along the first axis, and nothing for the last ranks where it is short
    with torch.no_grad():
        parameter.to_local().copy_(parts[rank()] if rank() < len(parts) else weight[:0])
    return True


def here(weight: Tensor) -> Tensor:
    """What this rank has of a weight: its part, or all of it."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
