"""What stands around a run: one trainer a folder, no orphans, no hang without a name, no step on bad numbers."""

from megatron_completep.guards.guard import Guard
from megatron_completep.guards.watchdog import Watchdog

__all__ = ["Guard", "Watchdog"]
