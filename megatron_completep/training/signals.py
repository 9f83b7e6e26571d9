"""How a run is asked to stop: signals, and the time that it may take."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any


class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 ask for a stop between two steps; a second one ends the process at once, with 128 + its number.

    torchrun forwards the signal that a terminal has already sent to the whole process group: what follows within GRACE seconds of
    the first is taken for its echo. `exit_after_minutes` asks for a stop by itself, that long after the start, which was
    `already_seconds` ago. A thread hears the signals: while the main thread waits for another rank inside a collective, Python calls
    no handler. Outside of one the handler is first: the thread has to wait for the interpreter, and short steps do not.
    """

    GRACE = 2.0
    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, say: Callable[[str], None], exit_after_minutes: float | None = None, already_seconds: float = 0.0):
        self._say, self._asked_at, self._noted, self._time_is_up = say, 0.0, False, False
        self._leave_at = time.monotonic() + 60 * exit_after_minutes - already_seconds if exit_after_minutes else float("inf")
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        if not self._time_is_up and time.monotonic() > self._leave_at:
            self._time_is_up = True
            self._say("training.exit_after_minutes: the time is up; saving after this step, then leaving")
        return self._noted or self._asked_at > 0 or self._time_is_up

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._reading, self._writing = socket.socketpair()
            self._writing.setblocking(False)
            threading.Thread(target=self._listen, args=(self._reading,), name="signals", daemon=True).start()
            signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.set_wakeup_fd(-1)
            self._writing.close()  # ends the thread
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        self._noted = True

    def _listen(self, reading: socket.socket) -> None:
        with reading:
            while received := reading.recv(1):
                if received[0] in self.SIGNALS:
                    self._hear(signal.Signals(received[0]))

    def _hear(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._asked_at == 0:
            self._asked_at = now
            self._say(f"{number.name}: saving after this step, then leaving; once more leaves at once")
        elif now - self._asked_at > self.GRACE:
            os._exit(128 + number)
