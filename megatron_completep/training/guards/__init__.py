"""What stands around a run: one trainer a folder, no orphans, no hang without a name, no step on bad numbers."""

from megatron_completep.training.guards.guard import Guard

__all__ = ["Guard"]
