"""How a run is asked to stop: by signals, or by the time that it may take."""

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
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask for a stop between two steps.

    A second signal ends the process at once, with 128 + its number. torchrun forwards the signal
    that a terminal has already sent to the whole process group, so that whatever follows within
    GRACE seconds of the first one is taken for its echo. SIGHUP never ends the process at once: a
    terminal that is closed while the run saves is no reason for haste. Where SIGHUP was ignored at
    the start (nohup) it stays ignored, except under torchrun, which forwards it when it has decided
    to end itself.

    Until `begin` is called there is nothing to save. SIGINT then raises KeyboardInterrupt as usual;
    where the main thread does not notice it within GRACE seconds, the process ends as if it had.
    The other signals end the process at once, with the code that asks for a requeue.

    `exit_after_minutes` asks for a stop by itself, that long after the start of the process, which
    was `elapsed_seconds` ago.

    Signals are noticed in two ways, because neither always works. While the main thread waits for
    another rank inside a collective, Python calls no handler: a thread reads the signal's number
    from a socket. Between short steps that thread may wait long for the interpreter: the handler is
    first.
    """

    GRACE = 2.0

    def __init__(
        self,
        say: Callable[[str], None],
        exit_after_minutes: float | None = None,
        elapsed_seconds: float = 0.0,
        by_torchrun: bool = False,
        now: Callable[[], float] = time.monotonic,
        leave: Callable[[int], Any] = os._exit,
    ):
        self._say = say
        self._now = now
        self._leave = leave
        self._by_torchrun = by_torchrun
        self._leave_at = float("inf")
        if exit_after_minutes:
            self._leave_at = now() + 60 * exit_after_minutes - elapsed_seconds
        self._time_is_up = False
        self._begun = False
        self._handler_called = False
        self._asked_at: float | None = None  # when the thread read the first signal
        self._ended = threading.Event()
        self._previous_handlers: dict[int, Any] = {}
        self._listens = False

    @property
    def asked(self) -> bool:
        """Whether the run shall stop after its step."""
        if not self._time_is_up and self._now() > self._leave_at:
            self._time_is_up = True
            self._say(
                "training.exit_after_minutes: the time is up; saving after this step, then leaving"
            )
        return self._handler_called or self._asked_at is not None or self._time_is_up

    def __enter__(self) -> StopSignals:
        # Python allows signal handlers in the main thread only; elsewhere nothing listens.
        if threading.current_thread() is threading.main_thread():
            self._listens = True
            self._reading, self._writing = socket.socketpair()
            self._writing.setblocking(False)
            listener = threading.Thread(
                target=self._listen, args=(self._reading,), name="signals", daemon=True
            )
            listener.start()
            signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
            for number in SIGNALS:
                # SIGINT keeps Python's handler until `begin`.
                if number != signal.SIGINT and not self._is_ignored(number):
                    self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def begin(self) -> None:
        """Say that training begins: from here on a signal asks for a stop between two steps."""
        self._begun = True
        if self._listens:
            self._previous_handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._handle)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._listens:
            signal.set_wakeup_fd(-1)
            self._writing.close()  # ends the thread
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _is_ignored(self, number: signal.Signals) -> bool:
        if number != signal.SIGHUP or self._by_torchrun:
            return False
        return signal.getsignal(number) == signal.SIG_IGN

    def _handle(self, *_: object) -> None:
        """Run by the interpreter in the main thread, between two of its instructions."""
        self._handler_called = self._begun

    def _listen(self, reading: socket.socket) -> None:
        """Run by the listening thread: one byte arrives for each signal, its number."""
        with reading:
            while received := reading.recv(1):
                if received[0] not in SIGNALS:
                    continue
                number = signal.Signals(received[0])
                if self._begun:
                    self._hear(number)
                else:
                    self._hear_early(number)

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
        # KeyboardInterrupt does not reach a main thread that waits for another rank.
        elif not self._ended.wait(self.GRACE):
            self._say(INTERRUPTED)
            self._leave(128 + number)
