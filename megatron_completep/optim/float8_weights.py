"""The scales of float8 weights: one a stored matrix, the same in every layout.

A rank takes the largest magnitudes of its own shard, behind the update that wrote it, and one small
all-reduce makes them those of whole matrices. So no weight is read twice for its scale, whatever
the update rule, and no rank needs more than its shard.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist

from megatron_completep import kernels
from megatron_completep.optim.shards import Shards
from megatron_completep.parallel.collectives import all_reduce
from megatron_completep.parallel.float8 import Float8Products


class WeightScales:
    """Tells the float8 weights of a rank how large they are, whenever they have changed.

    Making it is collective, as it may make the process group of `context.stage`.
    """

    def __init__(self, products: Float8Products, shards: Shards):
        self._shards = shards
        self._matrices = list(products.weights.values())
        self._axis = shards.context.stage
        numbers = {weight: number for number, weight in enumerate(products.weights)}
        rows = []
        for segment in shards.segments:
            number = numbers.get(shards.parameters[segment.name])
            if number is not None:
                rows.append((segment.shard_start, segment.size, number))
        table = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
        self._table = kernels.device_segments(table, shards.context.device)
        shards.on_new_parameters.append(self.renew)
        self.renew()

    def renew(self) -> None:
        """Called when this rank's shard has new values. Communicates over shards x tensor."""
        if not self._matrices:
            return
        shards = self._shards
        # What is stored is what the products round.
        stored = shards.master if shards.flat_shard is None else shards.flat_shard
        largest = kernels.largest_of_segments(stored, self._table, len(self._matrices))
        largest = all_reduce(largest, self._axis, dist.ReduceOp.MAX)
        for number, matrix in enumerate(self._matrices):
            matrix.renew(partial(largest.select, 0, number))
