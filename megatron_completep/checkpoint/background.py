"""One thread that does one job at a time while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue


class Background:
    """A daemon thread, started at once, so that handing a job over costs microseconds."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    def start(self, job: Callable[[], None]) -> None:
        """Hand over a job, which must not raise. Call `wait` first, for the job before it."""
        assert self._idle.is_set()
        self._idle.clear()
        self._jobs.put(job)

    def wait(self) -> None:
        """Return when the job at hand is done."""
        self._idle.wait()

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            finally:
                # Whatever happened, the training thread must not wait for ever.
                self._idle.set()
