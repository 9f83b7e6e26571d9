"""The reduction of one bucket's gradients, from its start until the sum lies in the shard."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.collectives import Pending, start_all_reduce

# With bf16 communication at most this many buckets are in their reduce-scatter, and at most as many
# older ones in their all-reduce over replicas.
OVERLAPPED = 2


@dataclass
class RunningReduction:
    """The reduction of one bucket, from its start until the result is in `grad_shard`."""

    pending: Pending  # first the reduce-scatter over the shard axis, then the sum over replicas
    replica: Axis  # the ranks that hold the same shard
    target: Tensor  # the bucket's slice of `grad_shard`
    replica_sum_started: bool = False

    def sum_over_replicas(self) -> None:
        """Wait for the reduce-scatter, and start the sum over replicas behind it, once."""
        if not self.replica_sum_started:
            self.pending = start_all_reduce(self.pending.wait(), self.replica)
            self.replica_sum_started = True

    def finish(self) -> None:
        """Wait until the sum lies in its place."""
        self.sum_over_replicas()
        gradients = self.pending.wait()
        # The sum is in another buffer if it was communicated in another dtype, or if there was no
        # reduce-scatter (one shard).
        if gradients.data_ptr() != self.target.data_ptr():
            self.target.copy_(gradients)
