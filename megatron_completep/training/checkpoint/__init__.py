"""Checkpoints that any layout reads, committed by one rename, every byte hashed."""

from megatron_completep.training.checkpoint.checkpointer import Checkpointer, SaveReport, no_fail_point
from megatron_completep.training.checkpoint.load import StoredCheckpoint
from megatron_completep.training.checkpoint.save import FailPoint

__all__ = ["Checkpointer", "FailPoint", "SaveReport", "StoredCheckpoint", "no_fail_point"]
