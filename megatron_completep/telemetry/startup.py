"""Where the time goes between the start of a process and its first step: what a restart costs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from megatron_completep.run.hook import Hook, StepRecord


class StartupClock:
    """Seconds by phase; each `done` ends the phase that began with the one before. By a clock that nobody sets, unlike that of the day."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds: dict[str, float] = {}
        self._now, self._since = now, now()

    @classmethod
    def from_process_start(cls) -> StartupClock:
        """With a first phase, `imports`, from the start of the process until now."""
        clock = cls()
        clock.seconds["imports"] = seconds_since_process_start()
        return clock

    @property
    def elapsed(self) -> float:
        """Seconds since the first phase began."""
        return sum(self.seconds.values()) + self._now() - self._since

    def done(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] = now - self._since
        self._since = now


def seconds_since_process_start(stat: Path = Path("/proc/self/stat")) -> float:
    """Age of this process. Linux tells its start in the time since boot; elsewhere the clock of the day has to do."""
    try:
        fields_after_name = stat.read_text().rpartition(")")[2].split()
        started = int(fields_after_name[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError, IndexError, ValueError):
        return max(0.0, time.time() - psutil.Process().create_time())


class StartupReport(Hook):
    """With the first step: one line, and the seconds of each phase in its record."""

    def __init__(self, clock: StartupClock, say: Callable[[str], None]):
        self._clock: StartupClock | None = clock
        self._say = say

    def after_step(self, record: StepRecord) -> None:
        if self._clock is None:
            return
        self._clock.done("first_step")
        seconds, self._clock = self._clock.seconds, None
        record.startup_seconds = seconds
        phases = ", ".join(
            f"{phase.replace('_', ' ')} {value:.1f}" for phase, value in seconds.items()
        )
        self._say(f"first step {sum(seconds.values()):.1f} s after the start: {phases}")
