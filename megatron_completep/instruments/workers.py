"""A pool of processes that trains many small models at once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from megatron_completep.launch import interrupts_held, work_for


@contextmanager
def processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of `workers` processes, which end with this process even where it is killed.

    At Ctrl-C they end at once. After an error the calls that are running are finished, and those
    that wait are dropped.
    """
    children_before = set(multiprocessing.active_children())
    # A forked process would inherit the locks of torch's threads, and cannot use CUDA.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, context, initializer=work_for, initargs=(os.getpid(),)
    ) as pool:
        # The first call starts all workers. Ctrl-C is held meanwhile, for a worker that is still
        # importing would answer it with a traceback.
        with interrupts_held():
            pool.submit(os.getpid)
        try:
            yield pool
        except BaseException as reason:
            pool.shutdown(wait=False, cancel_futures=True)
            # Results are written in one move, so a worker that is ended leaves no torn file.
            if not isinstance(reason, Exception):
                for worker in set(multiprocessing.active_children()) - children_before:
                    worker.terminate()
            raise
