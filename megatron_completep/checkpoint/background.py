"""One thread that does one job at a time while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue


class Background:
    """The thread waits for jobs from the beginning, so that handing one over costs microseconds; it never keeps a process alive."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    def start(self, job: Callable[[], None]) -> None:
        """Hand over a job that raises nothing. The one before must have been waited for."""
        assert self._idle.is_set()
        self._idle.clear()
        self._jobs.put(job)

    def wait(self) -> None:
        """Until there is nothing to do."""
        self._idle.wait()

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            finally:
                self._idle.set()
