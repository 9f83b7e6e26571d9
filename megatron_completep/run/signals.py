"""How a run is asked to stop: signals, and the time that it may take."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from megatron_completep.launch import INTERRUPTED
from megatron_completep.run.state import ExitCode

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopSignals:
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask for a stop between two steps; a second one ends the process at once, with 128 + its number.

    torchrun forwards the signal that a terminal has already sent to the whole process group: what follows within GRACE seconds of
    the first is taken for its echo. A hang-up never ends the process at once: a terminal that is closed while the run saves is no haste.
    Where SIGHUP was ignored at the start (nohup) it stays so, but under torchrun, which hands it on when it has resolved to end itself.

    Until `begin`, the run has nothing to save: SIGINT raises KeyboardInterrupt as ever, and where that is not heard within GRACE seconds
    the process ends as if it had been; the others leave at once, with the code that asks for a requeue.

    `exit_after_minutes` asks for a stop by itself, that long after the start, which was `already_seconds` ago. A thread hears the
    signals: while the main thread waits for another rank inside a collective, Python calls no handler. Outside of one the handler is
    first: the thread has to wait for the interpreter, and short steps do not.
    """

    GRACE = 2.0

    def __init__(
        self,
        say: Callable[[str], None],
        exit_after_minutes: float | None = None,
        already_seconds: float = 0.0,
        by_torchrun: bool = False,
        now: Callable[[], float] = time.monotonic,
        leave: Callable[[int], Any] = os._exit,
    ):
        self._say, self._now, self._leave = say, now, leave
        self._asked_at: float | None = None
        self._begun, self._noted, self._time_is_up = False, False, False
        self._leave_at = (
            now() + 60 * exit_after_minutes - already_seconds
            if exit_after_minutes
            else float("inf")
        )
        self._by_torchrun = by_torchrun
        self._ended = threading.Event()
        self._before: dict[int, Any] = {}
        self._listens = False

    @property
    def asked(self) -> bool:
        if not self._time_is_up and self._now() > self._leave_at:
            self._time_is_up = True
            self._say(
                "training.exit_after_minutes: the time is up; saving after this step, then leaving"
            )
        return self._noted or self._asked_at is not None or self._time_is_up

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._listens = True
            self._reading, self._writing = socket.socketpair()
            self._writing.setblocking(False)
            threading.Thread(
                target=self._listen, args=(self._reading,), name="signals", daemon=True
            ).start()
            signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
            for number in SIGNALS:
                if number != signal.SIGINT and not self._is_ignored(number):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def begin(self) -> None:
        """Training begins: from here on a signal asks for a stop between two steps."""
        self._begun = True
        if self._listens:
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._listens:
            signal.set_wakeup_fd(-1)
            self._writing.close()  # ends the thread
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _is_ignored(self, number: signal.Signals) -> bool:
        return (
            number == signal.SIGHUP
            and not self._by_torchrun
            and signal.getsignal(number) == signal.SIG_IGN
        )

    def _note(self, *_: object) -> None:
        self._noted = self._begun

    def _listen(self, reading: socket.socket) -> None:
        with reading:
            while received := reading.recv(1):
                if received[0] in SIGNALS:
                    (self._hear if self._begun else self._hear_early)(signal.Signals(received[0]))

    def _hear(self, number: signal.Signals) -> None:
        now = self._now()
        if self._asked_at is None:
            self._asked_at = now
            self._say(
                f"{number.name}: saving after this step, then leaving; once more leaves at once"
            )
        elif now - self._asked_at > self.GRACE and number != signal.SIGHUP:
            self._leave(128 + number)

    def _hear_early(self, number: signal.Signals) -> None:
        if number != signal.SIGINT:
            self._say(f"{number.name} before the first step: there is nothing new to save; leaving")
            self._leave(int(ExitCode.REQUEUE))
        elif not self._ended.wait(self.GRACE):  # the main thread waits for another rank
            self._say(INTERRUPTED)
            self._leave(128 + number)
