"""Several ranks on one GPU: a backend whose collectives go through the memory of the host.

NCCL refuses two ranks of a communicator on one device, and gloo takes tensors of a GPU for some
collectives only. Under this backend a collective copies its tensors to the host, runs there over
gloo, and copies the result back when it is waited for. All else is what ranks with a GPU each run:
operators, queues, buckets, hooks, schedules. It is for tests of correctness: it is slow, and shows
nothing of NCCL's order or of overlap. It takes tensors of the CPU alike.

Whoever wants it joins by `join_staged` and lays the mesh by `ParallelContext.over_world`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

STAGED = "staged"


def join_staged(meeting_point: Path, rank: int, world_size: int, timeout: timedelta) -> None:
    """Make the process group of this process, whose ranks meet at a file that does not exist yet.

    The mesh's groups get the same backend. Communicates with all ranks.
    """
    if not hasattr(dist.Backend, STAGED.upper()):
        dist.Backend.register_backend(STAGED, _make_group, devices=["cpu", "cuda"])
    dist.init_process_group(
        STAGED,
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )


def _make_group(store: dist.Store, rank: int, size: int, timeout: timedelta) -> StagedGroup:
    return StagedGroup(store, rank, size, timeout)


class StagedWork(dist.Work):
    """A collective under way: its result is on the device when `wait` returns, and not before."""

    def __init__(self, work: Any, arrive: Callable[[], None]):
        """work: gloo's own. arrive: copies the result from the host."""
        super().__init__()
        self._work = work
        self._arrive = arrive
        self._waited = False

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait for gloo, then for the copy to the device; a second call does nothing.

        timeout: the group's own holds.
        """
        if not self._waited:
            self._work.wait()
            # The pipeline library receives into buffers that require gradients.
            with torch.no_grad():
                self._arrive()
            self._waited = True
        return True

    def is_completed(self) -> bool:
        return self._waited


class StagedGroup(dist.ProcessGroup):
    """The collectives that this project and torch's pipeline library call.

    Each takes what `torch.distributed` hands to a group, under its names: lists with one tensor,
    and options. The base class has further ways to call them, which nobody uses.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        super().__init__(rank, size)  # type: ignore[call-arg]  # one of its two constructors
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        self._ranks = size
        self._rank = rank

    def getBackendName(self) -> str:
        return STAGED

    # The base class keeps the name in the backends that were registered with it: here are none.
    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> str:  # type: ignore[override]
        return self._name

    def allreduce(  # type: ignore[override]
        self, tensors: Sequence[Tensor], opts: Any = None
    ) -> StagedWork:
        hosts = [_on_host(tensor) for tensor in tensors]
        opts = dist.AllreduceOptions() if opts is None else opts
        return StagedWork(self._gloo.allreduce(hosts, opts), _copies(tensors, hosts))

    def broadcast(  # type: ignore[override]
        self, tensors: Sequence[Tensor], opts: Any = None
    ) -> StagedWork:
        hosts = [_on_host(tensor) for tensor in tensors]
        opts = dist.BroadcastOptions() if opts is None else opts
        return StagedWork(self._gloo.broadcast(hosts, opts), _copies(tensors, hosts))

    def allgather(  # type: ignore[override]
        self,
        outputs: Sequence[Sequence[Tensor]],
        inputs: Sequence[Tensor],
        opts: Any = None,
    ) -> StagedWork:
        (gathered,) = outputs
        (own,) = inputs
        hosts = [torch.empty_like(part, device="cpu") for part in gathered]
        work = self._gloo.allgather([hosts], [_on_host(own)])
        return StagedWork(work, _copies(gathered, hosts))

    def all_gather_single(self, out: Tensor, own: Tensor, opts: Any = None) -> StagedWork:
        """[s, ...] on each rank -> out [size * s, ...]."""
        return self.allgather([out.chunk(self._ranks)], [own])

    def reduce_scatter_single(self, out: Tensor, parts: Tensor, opts: Any = None) -> StagedWork:
        """parts [size * s, ...] -> out [s, ...], this rank's part of the sum."""
        # Gloo's own reduce-scatter is another one from version to version.
        host = _on_host(parts)
        reduce = dist.AllreduceOptions()
        if opts is not None:
            reduce.reduceOp = opts.reduceOp
        work = self._gloo.allreduce([host], reduce)
        return StagedWork(work, _copies([out], [host.chunk(self._ranks)[self._rank]]))

    def all_to_all_single(
        self,
        out: Tensor,
        own: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: Any = None,
    ) -> StagedWork:
        """Consecutive runs of own, one for each rank, in the sizes given; empty: all are equal."""
        host = torch.empty_like(out, device="cpu")
        opts = dist.AllToAllOptions() if opts is None else opts
        work = self._gloo.alltoall_base(
            host, _on_host(own), output_split_sizes, input_split_sizes, opts
        )
        return StagedWork(work, _copies([out], [host]))

    # The names of the three before torch 2.13.
    _allgather_base = all_gather_single  # type: ignore[assignment]
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]
    alltoall_base = all_to_all_single  # type: ignore[assignment]

    def send(self, tensors: Sequence[Tensor], dstRank: int, tag: int = 0) -> StagedWork:
        hosts = [_on_host(tensor) for tensor in tensors]

        def keep() -> None:
            hosts.clear()  # gloo reads them until it has sent

        return StagedWork(self._gloo.send(hosts, dstRank, tag), keep)

    def recv(self, tensors: Sequence[Tensor], srcRank: int, tag: int = 0) -> StagedWork:
        hosts = [torch.empty_like(tensor, device="cpu") for tensor in tensors]
        return StagedWork(self._gloo.recv(hosts, srcRank, tag), _copies(tensors, hosts))

    def barrier(self, opts: Any = None) -> StagedWork:
        opts = dist.BarrierOptions() if opts is None else opts
        return StagedWork(self._gloo.barrier(opts), lambda: None)


def _on_host(tensor: Tensor) -> Tensor:
    """A copy on the host, dense: gloo writes into it, and what it copies may be in use."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _copies(targets: Sequence[Tensor], hosts: Sequence[Tensor]) -> Callable[[], None]:
    def arrive() -> None:
        for target, host in zip(targets, hosts, strict=True):
            target.copy_(host.view(target.shape))

    return arrive
