"""What protects a run: one trainer per folder, hangs that are named, no steps on bad numbers."""

from megatron_completep.guards.guard import Guard
from megatron_completep.guards.watchdog import Watchdog

__all__ = ["Guard", "Watchdog"]
