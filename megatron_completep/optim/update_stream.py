"""Where the update runs: bucket by bucket on a stream of its own, under the next forward pass.

The update reads and writes memory and the forward pass computes, so that a GPU can do both at once.
Each module waits for the buckets of its own parameters before it runs (`Shards._await_buckets`),
as it does for their all-gathers; whoever reads parameters, masters or states otherwise calls
`wait_for_parameters` first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from megatron_completep.parallel.collectives import Pending


class Arrival(Protocol):
    """Something under way on a device, or between ranks."""

    def wait(self) -> object:
        """Return when what follows on the current stream sees the result."""


class UpdateStream(Protocol):
    """What `Shards` hands the updates of buckets to."""

    def begin(self) -> None:
        """Called once a step: what was launched until now comes before the updates."""

    def run(self, work: Callable[[], Pending]) -> Arrival:
        """Run the update of a bucket, and start its all-gather behind it."""


class CudaUpdateStream:
    """A second stream of a GPU, of the default stream's priority."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)

    def begin(self) -> None:
        """Let the stream wait for the gradients and the record of the step."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def run(self, work: Callable[[], Pending]) -> Arrival:
        """Launch on the second stream; a collective started there waits for its kernels."""
        with torch.cuda.stream(self._stream):
            pending = work()
            launched = torch.cuda.Event()
            launched.record(self._stream)
        return _OnStream(pending, launched)


class _OnStream:
    """Kernels of the second stream, and the collective behind them."""

    def __init__(self, pending: Pending, launched: torch.cuda.Event):
        self._pending = pending
        self._launched = launched

    def wait(self) -> None:
        """Let the current stream wait; the host goes on."""
        self._launched.wait()
        self._pending.wait()
