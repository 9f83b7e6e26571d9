"""Processes that work for a command-line program: Ctrl-C is the program's matter, and they end with it."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Processes started inside never hear Ctrl-C, which a terminal sends to them as well: the program hears it, after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def ended_with(pool: Executor) -> Iterator[None]:
    """When the block raises, what was not begun is left out; when it was interrupted, what was begun is ended too."""
    others = set(multiprocessing.active_children())
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
