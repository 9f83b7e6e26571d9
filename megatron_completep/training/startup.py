"""Where the time goes between the start of a process and its first step: what a restart costs."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

from megatron_completep.training.hooks import Hook, StepRecord


class StartupClock:
    """Seconds by phase; each `done` ends the phase that began with the one before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.time()

    @classmethod
    def from_process_start(cls) -> StartupClock:
        """With a first phase, `imports`, from the start of the process until now."""
        clock = cls()
        clock.seconds["imports"] = clock._since - psutil.Process().create_time()
        return clock

    @property
    def elapsed(self) -> float:
        """Seconds since the first phase began."""
        return sum(self.seconds.values()) + time.time() - self._since

    def done(self, phase: str) -> None:
        now = time.time()
        self.seconds[phase] = now - self._since
        self._since = now


class StartupReport(Hook):
    """With the first step: one line, and `startup_PHASE_seconds` in its record. Stands before the metrics."""

    def __init__(self, clock: StartupClock, say: Callable[[str], None]):
        self._clock: StartupClock | None = clock
        self._say = say

    def after_step(self, record: StepRecord) -> None:
        if self._clock is None:
            return
        self._clock.done("first_step")
        seconds, self._clock = self._clock.seconds, None
        record.added |= {f"startup_{phase}_seconds": value for phase, value in seconds.items()}
        record.added["startup_seconds"] = sum(seconds.values())
        phases = ", ".join(f"{phase.replace('_', ' ')} {value:.1f}" for phase, value in seconds.items())
        self._say(f"first step {sum(seconds.values()):.1f} s after the start: {phases}")
