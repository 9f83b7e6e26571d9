"""Which checkpoints stay: the newest few, and every one whose step is a multiple."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_completep.checkpoint.manifest import committed_steps


def superseded(steps: Iterable[int], keep: int, keep_every: int | None) -> list[int]:
    """The steps to remove, lowest first."""
    ordered = sorted(steps)
    newest = set(ordered[-keep:])
    return [
        step
        for step in ordered
        if step not in newest and not (keep_every and step % keep_every == 0)
    ]


@dataclass
class Removal:
    """What was removed, and what could not be, with the reason. One that stays does not keep the others."""

    removed: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def remove(self, folder: Path) -> None:
        """It stops being a checkpoint before its first file goes."""
        leaving = folder.with_name(f".removing.{folder.name}.{secrets.token_hex(4)}")
        try:
            os.rename(folder, leaving)
        except OSError as error:
            self.problems.append(f"{folder}: {error.strerror}")
            return
        self.removed.append(folder)
        shutil.rmtree(leaving, ignore_errors=True)
        if leaving.exists():
            self.problems.append(
                f"{folder} is no checkpoint any more, but files of it remain in {leaving}. Remove them by hand."
            )


def prune(
    checkpoints: Path,
    keep: int,
    keep_every: int | None,
    progress: Callable[[], None] = lambda: None,
) -> Removal:
    """Remove superseded checkpoints. progress: called after each."""
    folders, removal = committed_steps(checkpoints), Removal()
    for step in superseded(folders, keep, keep_every):
        removal.remove(folders[step])
        progress()
    return removal
