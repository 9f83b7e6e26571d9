"""Which checkpoints are kept: the newest few, and every one whose step is a given multiple."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_completep.checkpoint.manifest import committed_steps


def superseded(steps: Iterable[int], keep: int, keep_every: int | None) -> list[int]:
    """The steps to remove, lowest first.

    keep: of the newest. keep_every: steps that are a multiple of it stay; None: no others.
    """
    ordered = sorted(steps)
    kept_steps = set(ordered[-keep:])
    if keep_every:
        kept_steps |= {step for step in ordered if step % keep_every == 0}
    return [step for step in ordered if step not in kept_steps]


@dataclass
class Removal:
    """What was removed, and what could not be, with the reason.

    One that stays does not keep the others.
    """

    removed: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def remove(self, folder: Path) -> None:
        """Remove a checkpoint, or note why it stays."""
        # It stops being a checkpoint by one rename, before its first file goes: whatever interrupts
        # the removal, no reader meets half of one.
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
                f"{folder} is no checkpoint any more, but files of it remain in {leaving}. "
                "Remove them by hand."
            )


def prune(
    checkpoints: Path,
    keep: int,
    keep_every: int | None,
    progress: Callable[[], None] = lambda: None,
) -> Removal:
    """Remove superseded checkpoints. `progress` is called after each."""
    folders = committed_steps(checkpoints)
    removal = Removal()
    for step in superseded(folders, keep, keep_every):
        removal.remove(folders[step])
        progress()
    return removal
