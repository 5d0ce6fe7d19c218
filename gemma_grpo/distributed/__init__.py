"""The ranks of one run: who does which share of the work, and that all of them know the same afterwards. On one device it does nothing.

Every rank runs the same program on the same state. What is heavy - sampling, scoring, gradients - is cut into shares (`share`), and its
results are put together (`sum_`, `gather`), so that from there on all ranks hold the same again and decide alike. How many ranks there
are changes who computes, never what. Owns torch.distributed.
"""

from gemma_grpo.distributed.exchange import agree, copy_from_main, from_main, gather, share, shares, sum_, sum_by_name
from gemma_grpo.distributed.meeting import (
    GRACE,
    STARTING,
    RankError,
    base_for_sampling,
    is_main,
    is_sharded,
    joined,
    meet,
    rank,
    seconds_waited,
    together,
    world,
)
from gemma_grpo.distributed.sharding import PARTED, Pass, ShardedLayers, here, own_part

__all__ = [
    "GRACE",
    "PARTED",
    "STARTING",
    "Pass",
    "RankError",
    "ShardedLayers",
    "agree",
    "base_for_sampling",
    "copy_from_main",
    "from_main",
    "gather",
    "here",
    "is_main",
    "is_sharded",
    "joined",
    "meet",
    "own_part",
    "rank",
    "seconds_waited",
    "share",
    "shares",
    "sum_",
    "sum_by_name",
    "together",
    "world",
]
