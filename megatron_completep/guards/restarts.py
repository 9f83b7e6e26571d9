"""Ends a job whose restarts by the launcher make no progress."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_completep.config.json_text import read_json
from megatron_completep.errors import ConfigError, DataError
from megatron_completep.files import write_whole
from megatron_completep.run.state import ExitCode, RunStopped

STARTS = ".starts.json"


def note_start(folder: Path, restart_count: int, step: int, limit: int) -> None:
    """Record on rank 0 that the run resumed at `step`.

    Args:
        folder: the run's; the steps are kept there from start to start.
        restart_count: how often the launcher has restarted the job; 0 begins a new count.
        limit: restarts without progress that are allowed.

    Raises:
        RunStopped: (NO_PROGRESS) the last `limit` restarts all resumed at this step, so that
            whatever ended them will do so again.
        ConfigError: the steps cannot be written.
    """
    # The first start of a launch is no restart: whoever launched it may have mended the cause.
    path = folder / STARTS
    steps = _read(path) if restart_count > 0 else []
    # `limit` restarts follow one start, so that many steps plus one are compared.
    steps = [*steps, step][-(limit + 1) :]
    try:
        write_whole(path, json.dumps(steps).encode())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}. Free some space, or choose another "
            "training.output_dir."
        ) from None
    if len(steps) == limit + 1 and len(set(steps)) == 1:
        raise RunStopped(
            f"{limit} restarts in a row got no further than step {step}. Look at the first error "
            "above, or save more often (checkpoint.interval) if steps were made but not kept.",
            ExitCode.NO_PROGRESS,
        )


def _read(path: Path) -> list[int]:
    """The steps of earlier starts. A file that is missing or damaged only begins the count anew."""
    try:
        steps = read_json(path)
    except DataError:
        return []
    if not isinstance(steps, list):
        return []
    return [step for step in steps if isinstance(step, int)]
