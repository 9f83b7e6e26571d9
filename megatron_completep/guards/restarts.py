"""Restarts by the launcher go on while they get anywhere."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_completep.config.json_text import read_json
from megatron_completep.errors import ConfigError, DataError
from megatron_completep.files import write_whole
from megatron_completep.run.state import ExitCode, RunStopped

STARTS = ".starts.json"


def note_start(folder: Path, restart_count: int, step: int, limit: int) -> None:
    """Remember that a start number `restart_count` of one launch resumed at `step`. On rank 0.

    Raises RunStopped (NO_PROGRESS) when the last `limit` restarts all found the same step: whatever ended them will do so again.
    """
    path = folder / STARTS
    steps = _read(path) if restart_count > 0 else []
    steps = [*steps, step][-(limit + 1) :]
    try:
        write_whole(path, json.dumps(steps).encode())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}. Free some space, or choose another training.output_dir."
        ) from None
    if len(steps) == limit + 1 and len(set(steps)) == 1:
        raise RunStopped(
            f"{limit} restarts in a row got no further than step {step}. Look at the first error above, "
            "or save more often (checkpoint.interval) if steps were made but not kept.",
            ExitCode.NO_PROGRESS,
        )


def _read(path: Path) -> list[int]:
    try:
        value = read_json(path)
    except DataError:
        return []
    return [step for step in value if isinstance(step, int)] if isinstance(value, list) else []
