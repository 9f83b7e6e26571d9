"""One axis of the mesh of ranks, and one rank's share along it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it.

    `group` is None where the axis has one rank, so that there is nothing to communicate.
    """

    name: str
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def share(self) -> Share:
        """Which part of what the axis divides is this rank's."""
        return Share(self.name, self.rank, self.size)


class Share(NamedTuple):
    """Part number `rank` of `size` along a named axis.

    It is plain data, and so it can outlive the process groups.
    """

    axis: str
    rank: int
    size: int


class Reduction(NamedTuple):
    """How an axis over which gradients are summed is divided into `replica` x `shard`."""

    shard: Axis  # ranks that share one copy of the optimizer's state, an equal part each
    replica: Axis  # ranks that hold the same part of it

    @property
    def size(self) -> int:
        """Ranks over which a gradient is summed."""
        return self.shard.size * self.replica.size
