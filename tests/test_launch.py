"""What launchers tell a process, and that a process leaves with the one that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_completep.errors import ConfigError
from megatron_completep.launch import Launch, read_launch

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
BY_HAND = {
    name: TORCHRUN[name]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
}
MISSING = None


def changed(environment: dict[str, str], changes: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in {**environment, **changes}.items() if value is not None}


# The variables.


def test_what_torchrun_a_person_or_nobody_tells_is_read() -> None:
    assert read_launch(TORCHRUN) == Launch(
        3, 4, 1, 2, 2, True, True, "node7", 29500, launcher_holds_store=True
    )
    assert read_launch(BY_HAND) == Launch(3, 4, 1, 1, 0, True, False, "node7", 29500)
    assert (
        read_launch({})
        == Launch()
        == read_launch({"MASTER_ADDR": "", "TORCHELASTIC_RESTART_COUNT": "x"})
    )
    assert read_launch({"RANK": "0", "WORLD_SIZE": "1"}) == Launch(launched=True)
    assert (Launch().store_holder, read_launch(TORCHRUN).store_holder) == ("rank 0", "the launcher")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": ""}, ["a process without RANK: ", "RANK is empty"]),
        ({"RANK": "  "}, ["RANK is empty"]),
        ({"RANK": MISSING}, ["RANK is not set"]),
        ({"RANK": "x"}, ["rank x: ", "RANK = 'x' is not a whole number of at least 0"]),
        ({"RANK": "-1"}, ["RANK = '-1' is not a whole number of at least 0"]),
        # More digits than Python reads.
        ({"RANK": "1" * 5000}, ["is not a whole number of at least 0"]),
        ({"RANK": "1.0"}, ["RANK = '1.0' is not a whole number"]),
        ({"RANK": "²"}, ["RANK = '²' is not a whole number"]),
        (
            {"WORLD_SIZE": "2"},
            ["rank 3: ", "RANK = 3 is not below WORLD_SIZE = 2: 2 processes are numbered 0 to 1"],
        ),
        ({"RANK": "4"}, ["RANK = 4 is not below WORLD_SIZE = 4"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE = '0' is not a whole number of at least 1"]),
        ({"WORLD_SIZE": MISSING}, ["WORLD_SIZE is not set"]),
        ({"WORLD_SIZE": ""}, ["WORLD_SIZE is empty"]),
        ({"LOCAL_RANK": MISSING}, ["LOCAL_RANK is not set"]),
        (
            {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
            ["LOCAL_RANK = 2 is not below LOCAL_WORLD_SIZE = 2"],
        ),
        ({"LOCAL_WORLD_SIZE": "8"}, ["LOCAL_WORLD_SIZE = 8 is more than WORLD_SIZE = 4"]),
        ({"LOCAL_WORLD_SIZE": "2(x3)"}, ["LOCAL_WORLD_SIZE = '2(x3)' is not a whole number"]),
        ({"MASTER_ADDR": MISSING}, ["MASTER_ADDR is not set. It is the host of rank 0"]),
        ({"MASTER_ADDR": ""}, ["MASTER_ADDR is empty"]),
        ({"MASTER_PORT": MISSING}, ["MASTER_PORT is not set"]),
        ({"MASTER_PORT": "70000"}, ["MASTER_PORT = 70000 is no port"]),
        ({"MASTER_PORT": "http"}, ["MASTER_PORT = 'http' is not a whole number of at least 1"]),
        (
            {"TORCHELASTIC_RESTART_COUNT": "many"},
            ["TORCHELASTIC_RESTART_COUNT = 'many' is not a whole number"],
        ),
        (
            {"RANK": "", "WORLD_SIZE": "two", "LOCAL_RANK": "-1", "MASTER_ADDR": ""},
            ["RANK is empty", "WORLD_SIZE = 'two'", "LOCAL_RANK = '-1'", "MASTER_ADDR is empty"],
        ),
    ],
)
def test_variables_that_cannot_be_right_are_all_named_with_the_rank_and_what_to_do(
    changes, said
) -> None:
    with pytest.raises(ConfigError) as refused:
        read_launch(changed(BY_HAND, changes))
    first, *problems, advice = str(refused.value).splitlines()
    assert first.endswith("the launcher's variables cannot be used")
    assert "unset RANK, WORLD_SIZE and LOCAL_RANK" in advice
    named = [text for text in said if not text.endswith(": ")]
    assert len(problems) == len(named) and all(
        any(text in problem for problem in problems) for text in named
    ), problems
    assert all(text in first for text in said if text.endswith(": "))


# Leaving with whoever started it.

# `python -m megatron_completep.pretrain`, where the import of torch writes a file and takes for
# ever.
IMPORTING = """
import os, pathlib, runpy, sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
            time.sleep(600)
sys.meta_path.insert(0, Slow())
runpy.run_module("megatron_completep.pretrain", run_name="__main__", alter_sys=True)
"""


def environment(**values: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    return {**kept, "PYTHONPATH": str(ROOT), **values}


def wait_for_text(path: Path, seconds: float = 60.0) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.01)
    raise AssertionError(f"{path} did not come in {seconds} s")


def is_gone(process: psutil.Process, seconds: float = 60.0) -> bool:
    """Dead, where nobody adopts orphans too."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


def test_a_worker_leaves_with_its_launcher_while_it_imports(tmp_path: Path) -> None:
    started = tmp_path / "started"
    launcher = (
        "import subprocess, time; "
        f"subprocess.Popen({[sys.executable, '-c', IMPORTING, str(started)]}); "
        "time.sleep(600)"
    )
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    process = subprocess.Popen([sys.executable, "-c", launcher], env=environment(**alone))
    worker = psutil.Process(int(wait_for_text(started)))
    process.kill()
    process.wait()
    assert is_gone(worker)


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_ctrl_c_while_it_imports_is_one_sentence_a_node_and_130(
    tmp_path: Path, local_rank: str
) -> None:
    started = tmp_path / "started"
    command = [sys.executable, "-c", IMPORTING, str(started)]
    process = subprocess.Popen(
        command,
        env=environment(LOCAL_RANK=local_rank),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_text(started)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    sentence = "interrupted before the first step: nothing was trained, nothing is lost"
    assert (process.returncode, output.split("\n")) == (
        130,
        ["", sentence, ""] if local_rank == "0" else [""],
    )


WORKERS = {
    "a pool": """
from megatron_completep.instruments.workers import processes
def work(path):
    pathlib.Path(path, str(os.getpid())).touch()
    time.sleep(600)
if __name__ == "__main__":
    with processes(2) as pool:
        list(pool.map(work, [sys.argv[1]] * 2))
""",
    "preprocessing": """
from megatron_completep.preprocess import encode
from megatron_completep.preprocess.run import preprocess
from megatron_completep.preprocess.settings import PreprocessSettings, TokenizerChoice
def hang(self, block):
    pathlib.Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(600)
encode.Encoder.encode = hang
if __name__ == "__main__":
    pathlib.Path("in.jsonl").write_text('{"text": "x"}\\n' * 9)
    settings = PreprocessSettings(("in.jsonl",), "out", TokenizerChoice("bytes"))
    preprocess(settings, workers=2, block_bytes=30)
""",
}


@pytest.mark.parametrize("kind", WORKERS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_in_the_midst_of_their_work_leave_with_the_process_that_they_work_for(
    tmp_path: Path, kind: str, number: int
) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    (tmp_path / "program.py").write_text("import os, pathlib, sys, time\n" + WORKERS[kind])
    command = [sys.executable, "program.py", str(pids)]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(list(pids.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = [psutil.Process(int(path.name)) for path in pids.iterdir()]
    assert len(workers) == 2
    os.kill(process.pid, number) if number == signal.SIGKILL else os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert all(is_gone(worker) for worker in workers)
    # The program's own, which has nobody to catch KeyboardInterrupt; no worker's.
    assert errors.count("Traceback") <= 1
