"""Which checkpoints stay: the newest few, and every one whose step is a multiple."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_completep.training.checkpoint.manifest import committed_steps


def superseded(steps: Iterable[int], keep: int, keep_every: int | None) -> list[int]:
    """The steps to remove, lowest first."""
    ordered = sorted(steps)
    newest = set(ordered[-keep:])
    return [step for step in ordered if step not in newest and not (keep_every and step % keep_every == 0)]


def prune(checkpoints: Path, keep: int, keep_every: int | None) -> list[Path]:
    """Remove superseded checkpoints; returns their folders. One stops being a checkpoint before its first file goes."""
    folders = committed_steps(checkpoints)
    removed = [folders[step] for step in superseded(folders, keep, keep_every)]
    for folder in removed:
        remove_checkpoint(folder)
    return removed


def remove_checkpoint(folder: Path) -> None:
    leaving = folder.with_name(f".removing.{folder.name}")
    shutil.rmtree(leaving, ignore_errors=True)
    os.rename(folder, leaving)
    shutil.rmtree(leaving, ignore_errors=True)
