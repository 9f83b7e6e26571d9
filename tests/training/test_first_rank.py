"""What only rank 0 does in the run's folder:
where it cannot, every rank leaves with its message and exit code.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_completep.config import Config
from megatron_completep.errors import UserError
from megatron_completep.guards.lock import LOCK
from megatron_completep.pretrain import pretrain
from megatron_completep.run.starts import STARTS
from megatron_completep.run.state import ExitCode
from megatron_completep.telemetry.metrics import METRICS
from tests.support.ranks import launched_as
from tests.support.runs import tiny_config


def end_of_rank(rank: int, world_size: int, config: Config, restart: int = 0) -> tuple[int, str]:
    """The exit code, and what is said; any other error than the user's fails the test."""
    launched_as(rank, world_size)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restart)
    try:
        return int(pretrain(config)), ""
    except UserError as error:
        return error.exit_code, str(error)
    finally:
        del os.environ["TORCHELASTIC_RESTART_COUNT"]


def tiny(folder: Path, *overrides: str) -> Config:
    return tiny_config(
        folder,
        "training.train_steps=2",
        "guards.hang_timeout_minutes=null",
        "guards.lock_wait_seconds=0",
        *overrides,
    )


def a_file_for_the_folder(run: Path) -> None:
    run.rmdir()
    run.touch()


def a_line_that_is_no_start(run: Path) -> None:
    (run / STARTS).write_text("zz\n")


OBSTACLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "file": (a_file_for_the_folder, "cannot be written: File exists"),
    "lock": (lambda run: (run / LOCK).mkdir(), "cannot be written: .lock: Is a directory"),
    "config": (lambda run: (run / "config.yaml").mkdir(), "config.yaml is no regular file"),
    "metrics": (lambda run: (run / METRICS).mkdir(), "metrics.jsonl is no regular file"),
    "pipe": (lambda run: os.mkfifo(run / METRICS), "metrics.jsonl is no regular file"),
    "pipe for starts": (lambda run: os.mkfifo(run / STARTS), "starts.jsonl is no regular file"),
    "start": (a_line_that_is_no_start, "starts.jsonl, line 1: not a start"),
    "number": (lambda run: os.mkfifo(run / ".run_id"), ".run_id: not a plain file. Remove it"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_rank_0_cannot_do_ends_every_rank_with_its_message(
    tmp_path: Path, pool: Any, name: str
) -> None:
    place, said = OBSTACLES[name]
    config = tiny(tmp_path)
    run = Path(config.training.output_dir)
    run.mkdir(parents=True)
    place(run)
    ends = pool.run(2, end_of_rank, 2, config)
    assert [code for code, _ in ends] == [2, 2]
    assert all(said in text for _, text in ends), ends


def test_a_folder_in_use_ends_every_rank(tmp_path: Path, pool: Any) -> None:
    config = tiny(tmp_path)
    run = Path(config.training.output_dir)
    run.mkdir(parents=True)
    with (run / LOCK).open("w") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        ends = pool.run(2, end_of_rank, 2, config)
    assert [code for code, _ in ends] == [2, 2]
    assert all("is in use by process" in text for _, text in ends)
    assert pool.run(2, end_of_rank, 2, config) == [(0, ""), (0, "")]  # the control


def test_restarts_without_progress_end_every_rank_with_their_code(
    tmp_path: Path, pool: Any
) -> None:
    config = tiny(tmp_path, "guards.max_restarts_without_progress=1")
    assert [code for code, _ in pool.run(2, end_of_rank, 2, config)] == [0, 0]
    assert [code for code, _ in pool.run(2, end_of_rank, 2, config)] == [0, 0]
    ends = pool.run(2, end_of_rank, 2, config, 1)
    assert [code for code, _ in ends] == [ExitCode.NO_PROGRESS] * 2
    assert all("got no further than step 2" in text for _, text in ends)
