"""A pool of gloo ranks on this machine, started once for all distributed tests.

`pool.run(world_size, function, *arguments)` calls `function(rank, *arguments)` in as many processes, each inside a fresh
process group, and returns what they return, in rank order. Functions and arguments travel by pickle.
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
from typing import Any

GLOO_TIMEOUT = timedelta(seconds=280)  # a busy machine is no failure


def _serve(connection: Connection, path: list[str]) -> None:
    sys.path[:] = path
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while (job := connection.recv()) is not None:
        rank, world_size, store, function, arguments = job
        try:
            init_method = f"file://{store}"
            dist.init_process_group(
                "gloo",
                init_method=init_method,
                rank=rank,
                world_size=world_size,
                timeout=GLOO_TIMEOUT,
            )
            connection.send((True, function(rank, *arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            gc.collect()  # modules, hooks and meshes form cycles, and whatever holds a group keeps its threads running


class WorkerPool:
    """Ranks are forked from one server that has already imported torch, so that starting one costs milliseconds."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["torch", "torch.distributed", "torch.distributed.pipelining"]
        )
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results by rank; a rank's exception fails the caller with that rank's traceback."""
        while len(self._workers) < world_size:
            self._workers.append(self._start())
        with tempfile.TemporaryDirectory() as folder:
            store = os.path.join(folder, "store")
            chosen = self._workers[:world_size]
            for rank, (_, connection) in enumerate(chosen):
                connection.send((rank, world_size, store, function, arguments))
            results = [connection.recv() for _, connection in chosen]
        failures = [
            f"rank {rank}:\n{result}" for rank, (ok, result) in enumerate(results) if not ok
        ]
        if failures:
            raise AssertionError("\n".join(failures))
        return [result for _, result in results]

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, list(sys.path)), daemon=True)
        process.start()
        return process, ours

    def close(self) -> None:
        for process, connection in self._workers:
            connection.send(None)
            process.join(timeout=5)
            process.kill()
        self._workers.clear()
