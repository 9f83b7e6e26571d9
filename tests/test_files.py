"""Files and folders that appear whole or not at all:
on a full disk, and when the process is killed.

The limit on the size of a file stands for a full disk: the kernel refuses to write, and it does so
to whatever code writes.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_completep.checkpoint.adapt import adapt_checkpoint
from megatron_completep.checkpoint.examine import reshard_checkpoint
from megatron_completep.checkpoint.run_number import identify_run, renumber
from megatron_completep.config import load_config, save_config
from megatron_completep.data.left_out import LeftOut, read_left_out, write_left_out
from megatron_completep.errors import CheckpointError, ConfigError, DataError
from megatron_completep.files import append_line, is_being_filled, new_folder, write_whole
from megatron_completep.guards.lock import OutputLock
from megatron_completep.guards.restarts import note_start
from megatron_completep.instruments import sweep
from megatron_completep.run.starts import append_start, read_starts
from megatron_completep.run.state import RunState
from megatron_completep.telemetry.metrics import MetricsFile, read_metrics
from tests.support.checkpoints import TinyRun, checkpointed_config


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "write",
    [write_whole, append_line, lambda path, data: path.write_bytes(data)],
    ids=["whole", "line", "control"],
)
def test_what_a_full_disk_refuses_leaves_the_file_as_it_was(tmp_path, write):
    path = tmp_path / "file"
    path.write_bytes(b"before\n")
    with full_disk(), pytest.raises(OSError, match="File too large") as refused:
        write(path, b"after")
    if "control" in os.environ["PYTEST_CURRENT_TEST"]:
        # So the disk really is full, and a plain write really loses the file.
        assert contents(tmp_path) == {"file": b""}
        return
    assert contents(tmp_path) == {"file": b"before\n"} and refused.value.filename == str(path)
    write(path, b"after")
    assert contents(tmp_path) == {
        "file": {write_whole: b"after", append_line: b"before\nafter\n"}[write]
    }


def test_a_line_that_a_kill_left_torn_goes_when_the_next_one_comes(tmp_path):
    path = tmp_path / "lines"
    append_line(path, b"one")
    path.write_bytes(path.read_bytes() + b"tw")
    append_line(path, b"three")
    assert path.read_bytes() == b"one\nthree\n"


# What a run or a sweep writes first. Each is called twice: on an empty disk, then on a full one,
# then again.
FIRST_WRITES: dict[str, tuple[Callable[[Path, int], object], type[Exception]]] = {
    "config.yaml": (
        lambda folder, i: save_config(
            checkpointed_config(folder, training={"train_steps": 20 + i}), folder / "config.yaml"
        ),
        ConfigError,
    ),
    "rollbacks.json": (
        lambda folder, i: write_left_out(folder, [LeftOut(6, 48, 56 + i, 7)]),
        OSError,
    ),
    ".starts.json": (lambda folder, i: note_start(folder, 1, i, 3), ConfigError),
    ".run_id": (
        lambda folder, i: identify_run(folder) if i == 1 else renumber(folder),
        CheckpointError,
    ),
    "starts.jsonl": (
        lambda folder, i: append_start(folder, checkpointed_config(folder), RunState(i, 8 * i, 0)),
        OSError,
    ),
    "sweep.json": (
        lambda folder, i: sweep.save_grid(_grid(i), checkpointed_config(folder), folder),
        DataError,
    ),
}


def _grid(i: int) -> sweep.Grid:
    return sweep.Grid(learning_rates=[2.0**-i], depths=[2])


@pytest.mark.parametrize("name", FIRST_WRITES)
def test_a_full_disk_at_a_first_write_tears_nothing_and_a_later_start_goes_on(tmp_path, name):
    write, error = FIRST_WRITES[name]
    with full_disk(), pytest.raises(error, match=r"File too large") as refused:
        write(tmp_path, 1)
    assert name in str(refused.value)
    # At most an empty one.
    assert all(path.name == name and not path.read_bytes() for path in tmp_path.iterdir())
    write(tmp_path, 1)  # as if nothing had been
    before = contents(tmp_path)
    with full_disk(), pytest.raises(error):
        write(tmp_path, 2)
    assert contents(tmp_path) == before and list(before) == [name] and before[name]
    write(tmp_path, 2)
    assert contents(tmp_path) != before


def test_what_was_written_before_the_disk_was_full_reads_back(tmp_path):
    save_config(checkpointed_config(tmp_path), tmp_path / "config.yaml")
    write_left_out(tmp_path, [LeftOut(6, 48, 56, 7)])
    append_start(tmp_path, checkpointed_config(tmp_path), RunState())
    sweep.save_grid(_grid(1), checkpointed_config(tmp_path), tmp_path)
    with full_disk():
        for write in (
            lambda: save_config(
                checkpointed_config(tmp_path, training={"train_steps": 11}),
                tmp_path / "config.yaml",
            ),
            lambda: write_left_out(tmp_path, []),
            lambda: append_start(tmp_path, checkpointed_config(tmp_path), RunState(3, 24, 0)),
            lambda: sweep.save_grid(_grid(2), checkpointed_config(tmp_path), tmp_path),
        ):
            with pytest.raises((OSError, ConfigError, DataError)):
                write()
    assert load_config(tmp_path / "config.yaml") == checkpointed_config(tmp_path)
    assert read_left_out(tmp_path) == [LeftOut(6, 48, 56, 7)]
    assert [start.step for start in read_starts(tmp_path)] == [0]
    assert len(json.loads((tmp_path / "sweep.json").read_text())["grids"]) == 1


def test_a_sweep_whose_file_is_damaged_is_refused_and_not_replaced(tmp_path):
    (tmp_path / "sweep.json").write_text('{"grids": [')
    with pytest.raises(
        DataError, match=r"sweep\.json: not JSON .* Restore the file, or sweep into another folder"
    ):
        sweep.save_grid(_grid(1), checkpointed_config(tmp_path), tmp_path)
    assert (tmp_path / "sweep.json").read_text() == '{"grids": ['


def test_a_lock_whose_holder_a_full_disk_does_not_take_still_holds(tmp_path):
    with full_disk():
        lock = OutputLock(tmp_path)
    reading, writing = os.pipe()
    child = os.fork()  # the lock is not inherited
    if child == 0:
        try:
            OutputLock(tmp_path, 0)
        except ConfigError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as said:
        assert "is in use by process ? on another host" in said.read()
    lock.release()
    OutputLock(tmp_path).release()


def test_metrics_are_cut_without_room_for_a_copy(tmp_path):
    path, said = tmp_path / "metrics.jsonl", list[str]()
    path.write_text(
        "".join(json.dumps({"step": step, "loss": 4.0}) + "\n" for step in range(1, 6))
        + '{"step": 6, "lo'
    )
    with full_disk():
        file = MetricsFile(path, 3, said.append)
        file.write({"step": 4, "loss": 7.0})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    assert "cannot be written" in said[0]
    file.write({"step": 5, "loss": 6.0})
    file.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [
        (1, 4.0),
        (2, 4.0),
        (3, 4.0),
        (4, 7.0),
        (5, 6.0),
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


# Folders.


@pytest.fixture
def filling(tmp_path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Another process that fills a new folder, and the folder."""
    program = (
        "import sys, time; from pathlib import Path; from megatron_completep.files import "
        "new_folder\n"
        "with new_folder(Path(sys.argv[1])) as folder:\n    print(folder, flush=True)\n    "
        "time.sleep(3600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "step_00000001")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    yield process, folder
    process.kill()
    process.wait()


def test_what_a_killed_process_left_goes_with_the_next_attempt_and_what_a_living_one_fills_stays(
    tmp_path, filling
):
    process, folder = filling
    other = tmp_path / ".step_00000010.beef"  # of another target, whose name begins alike
    other.mkdir()
    assert is_being_filled(folder) and not is_being_filled(other)
    with new_folder(tmp_path / "step_00000001") as first:
        (first / "file").write_text("whole")
    assert folder.exists() and sorted(os.listdir(tmp_path / "step_00000001")) == ["file"]
    shutil.rmtree(tmp_path / "step_00000001")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with new_folder(tmp_path / "step_00000001"):
        assert not folder.exists() and other.exists()


def test_a_folder_whose_block_fails_or_whose_target_came_meanwhile_is_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a") as folder:
        folder.joinpath("file").write_text("half")
        raise ZeroDivisionError
    with pytest.raises(FileExistsError), new_folder(tmp_path / "a") as folder:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "precious").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "a",
        "a/precious",
    ]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    tiny = TinyRun(checkpointed_config(tmp_path / "run"))
    tiny.train(1)
    tiny.save()
    return tmp_path / "run" / "checkpoints" / "step_00000001"


def remainder(folder: Path, step: int) -> Path:
    left = folder / f".step_{step:08d}.deadbeef"
    left.mkdir(parents=True)
    (left / "part_00000_of_00002.safetensors").write_bytes(b"half")
    return left


def test_what_a_killed_reshard_left_goes_with_the_next(tmp_path, checkpoint):
    left = remainder(tmp_path / "out", 1)
    assert reshard_checkpoint(checkpoint, tmp_path / "out", 2).exists() and not left.exists()
    assert sorted(os.listdir(tmp_path / "out" / "step_00000001")) == [
        "manifest.json",
        "part_00000_of_00002.safetensors",
        "part_00001_of_00002.safetensors",
    ]


def test_what_a_killed_adapt_left_goes_with_the_next(tmp_path, checkpoint):
    deeper = checkpointed_config(tmp_path / "deeper", model={"num_layers": 3})
    left = remainder(tmp_path / "deeper" / "checkpoints", 1)
    folder, _ = adapt_checkpoint(checkpoint, deeper, tmp_path / "deeper" / "checkpoints")
    assert not left.exists() and os.listdir(folder.parent) == ["step_00000001"]
    assert TinyRun(deeper).resume()


def test_a_run_that_starts_where_a_tool_is_writing_leaves_it_alone(tmp_path, filling):
    process, folder = filling
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    folder.rename(checkpoints / folder.name)
    TinyRun(checkpointed_config(tmp_path / "run"))
    assert (checkpoints / folder.name).exists()
    process.kill()
    process.wait()
    after = TinyRun(checkpointed_config(tmp_path / "run"))
    assert not (checkpoints / folder.name).exists()
    assert any(f"removed {folder.name}" in line for line in after.messages)
