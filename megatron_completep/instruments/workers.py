"""A pool of processes of one thread each, for many small models at once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from megatron_completep.launch import interrupts_held, work_for


@contextmanager
def processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool that leaves with this process: when it is killed, and at once at Ctrl-C. After an error what is under way is finished."""
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, context, initializer=work_for, initargs=(os.getpid(),)
    ) as pool:
        with interrupts_held():
            pool.submit(os.getpid)  # starts them all
        try:
            yield pool
        except BaseException as reason:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(reason, Exception):
                for worker in set(multiprocessing.active_children()) - before:
                    worker.terminate()  # what it has not finished it has not written
            raise
