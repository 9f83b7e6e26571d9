"""Ranks on this machine: a pool of gloo processes, and each one's place in a layout.

`pool.run(world_size, function, *arguments)` calls `function(rank, *arguments)` in as many
processes, each inside a fresh process group, and returns what they return, in rank order. Functions
and arguments travel by pickle.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_completep.config.schema import ParallelConfig
    from megatron_completep.parallel.context import ParallelContext

GLOO_TIMEOUT = timedelta(seconds=280)  # a busy machine is no failure


def _serve(connection: Connection, path: list[str]) -> None:
    sys.path[:] = path
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while (job := connection.recv()) is not None:
        rank, world_size, store, function, arguments = job
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=GLOO_TIMEOUT,
            )
            # A rank that ends at once would close its connections while others still make theirs.
            dist.barrier()
            answer = (True, function(rank, *arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()
        # Modules, hooks and meshes form cycles, and what holds a group keeps its threads.
        gc.collect()
        # Last: whoever gets the answer removes the store's file, which threads of a group may read.
        try:
            connection.send(answer)
        except Exception:  # what cannot be pickled
            connection.send((False, traceback.format_exc()))
        del answer


class WorkerPool:
    """Ranks forked from one server that has imported torch: starting one costs milliseconds."""

    def __init__(self) -> None:
        self._start_method = multiprocessing.get_context("forkserver")
        self._start_method.set_forkserver_preload(
            ["torch", "torch.distributed", "torch.distributed.pipelining"]
        )
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results by rank; a rank's exception fails the caller with that rank's traceback."""
        while len(self._workers) < world_size:
            self._workers.append(self._start())
        connections = [connection for _, connection in self._workers[:world_size]]
        with tempfile.TemporaryDirectory() as folder:
            store = os.path.join(folder, "store")
            for rank, connection in enumerate(connections):
                connection.send((rank, world_size, store, function, arguments))
            answers = [connection.recv() for connection in connections]
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:
            # torch counts the groups of a process, and ranks that counted apart would not meet.
            self.close()
            raise AssertionError("\n".join(failures))
        return [result for _, result in answers]

    def _start(self) -> tuple[Any, Connection]:
        connection, far_end = self._start_method.Pipe()
        process = self._start_method.Process(
            target=_serve, args=(far_end, list(sys.path)), daemon=True
        )
        process.start()
        return process, connection

    def close(self) -> None:
        for process, connection in self._workers:
            connection.send(None)
            process.join(timeout=5)
            process.kill()
        self._workers.clear()


def context_on(rank: int, parallel: ParallelConfig) -> ParallelContext:
    """A rank's place in a layout over the process group at hand; without a group, one process."""
    import torch
    import torch.distributed as dist

    from megatron_completep.parallel.context import ParallelContext, data_parallel_size_for

    if not dist.is_initialized():
        return ParallelContext.single()
    world_size = dist.get_world_size()
    data_size = data_parallel_size_for(parallel, world_size)
    return ParallelContext.over_world(parallel, torch.device("cpu"), rank, world_size, data_size)


def launched_as(rank: int, world_size: int) -> None:
    """Set what a launcher tells a process.

    A process of the pool has joined its group already: nothing listens at the address.
    """
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",
    )
