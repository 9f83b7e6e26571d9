"""Where the time goes between the start of a process and its first step: the cost of a restart."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from megatron_completep.run.hook import BeginRecord, Hook, StepRecord


class StartupClock:
    """Seconds by phase. Each `done` ends a phase, and the next one begins.

    The clock is monotonic: the time of day may be set while a run starts.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds: dict[str, float] = {}
        self._now = now
        self._since = now()

    @classmethod
    def from_process_start(cls) -> StartupClock:
        """A clock whose first phase, `imports`, began with the process and ends now."""
        clock = cls()
        clock.seconds["imports"] = seconds_since_process_start()
        return clock

    @property
    def elapsed(self) -> float:
        """Seconds since the first phase began."""
        return sum(self.seconds.values()) + self._now() - self._since

    def done(self, phase: str) -> None:
        """End a phase, which began when the one before it ended."""
        now = self._now()
        self.seconds[phase] = now - self._since
        self._since = now


def seconds_since_process_start(stat: Path = Path("/proc/self/stat")) -> float:
    """Age of this process.

    Linux tells when it started, in ticks since boot. Elsewhere the time of day has to serve.
    """
    try:
        # The name of the program may hold spaces and brackets; the fields follow its last one.
        fields_after_name = stat.read_text().rpartition(")")[2].split()
        started = int(fields_after_name[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError, IndexError, ValueError):
        age = time.time() - float(psutil.Process().create_time())
        return max(0.0, age)


class StartupReport(Hook):
    """Prints one line with the first step, and adds the seconds of each phase to its record."""

    def __init__(self, clock: StartupClock, say: Callable[[str], None]):
        self._clock: StartupClock | None = clock
        self._say = say
        self._beginning: BeginRecord | None = None

    def before_training(self, record: BeginRecord) -> None:
        self._beginning = record

    def before_step(self, step: int) -> None:
        # Figures of before the first step are those of a validation, whose time is its own.
        if self._clock is not None and self._beginning is not None and self._beginning.figures:
            self._clock.done("first_validation")
        self._beginning = None

    def after_step(self, record: StepRecord) -> None:
        if self._clock is None:
            return
        self._clock.done("first_step")
        seconds = self._clock.seconds
        self._clock = None  # later steps have no start-up
        record.startup_seconds = seconds
        phases = [f"{phase.replace('_', ' ')} {spent:.1f}" for phase, spent in seconds.items()]
        total = sum(seconds.values())
        self._say(f"first step {total:.1f} s after the start: {', '.join(phases)}")
