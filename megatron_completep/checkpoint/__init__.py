"""Checkpoints that any layout can read: every byte is hashed, and one rename commits them."""

from megatron_completep.checkpoint.checkpointer import Checkpointer, SaveReport, no_fail_point
from megatron_completep.checkpoint.load import StoredCheckpoint
from megatron_completep.checkpoint.save import FailPoint

__all__ = ["Checkpointer", "FailPoint", "SaveReport", "StoredCheckpoint", "no_fail_point"]
