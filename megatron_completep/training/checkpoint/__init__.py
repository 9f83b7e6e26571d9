"""Checkpoints that any layout reads, committed by one rename, every byte hashed."""

from megatron_completep.training.checkpoint.checkpointer import Checkpointer, SaveReport
from megatron_completep.training.checkpoint.load import StoredCheckpoint

__all__ = ["Checkpointer", "SaveReport", "StoredCheckpoint"]
