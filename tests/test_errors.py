"""How a program ends: one message, one speaker, the right exit code."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_completep.errors import ConfigError, exit_on_user_error, say_once, when_interrupted

ROOT = Path(__file__).resolve().parents[1]


def raising(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("a.yaml: wrong."), 2, "error: a.yaml: wrong.\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("all is kept."), 130, "interrupted: all is kept.\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x/y"),
            2,
            "error: x/y: No space left on device. Free some space",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "x/y"),
            2,
            "error: x/y: Permission denied.",
        ),
    ],
)
def test_what_is_not_the_programs_fault_is_one_message(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(raising(error))
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (code, "") and captured.err.startswith(message)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a"),
        OSError(errno.ENOENT, "No such file", "x"),
        OSError(errno.ENOSPC, "No space left"),
    ],
)
def test_the_programs_own_faults_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        exit_on_user_error(raising(error))


ENDING = """
import sys
from megatron_completep.errors import exit_on_user_error

def main():
    print("an answer" * int(sys.argv[1]))

exit_on_user_error(main)
"""


@pytest.mark.parametrize("length", [1, 100_000])  # written at the end, or in the middle of the work
@pytest.mark.parametrize(
    ("stdout", "code", "message"),
    [
        (">&-", 0, ""),
        (">/dev/full", 2, "error: standard output: No space left on device. Free some space"),
        (">/dev/null", 0, ""),
    ],
)
def test_a_standard_output_that_takes_nothing_is_no_traceback(
    stdout: str, code: int, message: str, length: int
) -> None:
    words = ["sh", "-c", f'exec "$@" {stdout}', "sh", sys.executable, "-c", ENDING, str(length)]
    run = subprocess.run(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    assert run.returncode == code
    assert run.stderr.startswith(message)
    assert run.stderr.count("\n") == (1 if message else 0)


def test_bytes_of_names_that_are_not_utf_8_are_shown_as_such(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say_once("error: caf\udce9 \u00e9 \udc80.")
    say_once("error: \ud800")  # of no file's name
    assert capsys.readouterr().err == "error: caf\\xe9 \u00e9 \\x80.\nerror: \\ud800\n"


def test_the_innermost_sentence_of_an_interruption_counts() -> None:
    with (
        pytest.raises(KeyboardInterrupt, match="inner"),
        when_interrupted("outer"),
        when_interrupted("inner"),
    ):
        raise KeyboardInterrupt
    with pytest.raises(ValueError), when_interrupted("a"):
        raise ValueError


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Make this process a rank of torchrun: its local rank -> its error file."""

    def become(local_rank: int) -> Path:
        path = tmp_path / "attempt_0" / str(local_rank) / "error.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
        return path

    return become


def test_one_rank_speaks_for_all_that_say_the_same(
    rank: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for local_rank in (2, 0, 1):
        files.append(rank(local_rank))
        say_once("error: the same for all")
    rank(3)
    say_once("error: rank 3 alone has this")  # a mistake of one rank is never lost
    assert capsys.readouterr().err.splitlines() == [
        "error: the same for all",
        "error: rank 3 alone has this",
    ]
    records = [json.loads(path.read_text()) for path in files]
    assert [record["message"] for record in records] == [
        "error: the same for all",
        *["as another rank of this node says"] * 2,
    ]
    assert all(record["timestamp"] > records[0]["timestamp"] for record in records[1:])


def test_an_error_file_that_cannot_be_written_silences_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone/0/error.json"))
    say_once("error: caf\udce9")
    assert capsys.readouterr().err == "error: caf\\xe9\n"


@pytest.mark.slow
def test_torchrun_ends_with_the_message_once() -> None:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
    ]
    words = ["megatron_completep.pretrain", "configs/quickstart.yaml", "model.num_leyers=2"]
    run = subprocess.run([*launcher, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    # Of torchrun itself, which ends with its report.
    printed, _, report = run.stderr.partition("Traceback")
    assert run.returncode != 0 and printed.count("model.num_leyers: unknown key") == 1
    assert report.count("model.num_leyers: unknown key") == 1
    assert "megatron_completep/" not in report


WORKERS = """
import os, signal, time
from megatron_completep.instruments.workers import processes
from megatron_completep.errors import exit_on_user_error, when_interrupted

def wait(number):
    os.write(1, b"working\\n")
    time.sleep(600)

def main():
    # Tests that run in the background of a shell inherit that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with when_interrupted("all is kept."), processes(2) as pool:
        list(pool.map(wait, range(9)))

if __name__ == "__main__":
    exit_on_user_error(main)
"""


@pytest.mark.parametrize("whole_group", [True, False])  # from a terminal, or from `kill -INT`
def test_ctrl_c_ends_a_program_and_its_workers_with_one_sentence(
    tmp_path: Path, whole_group: bool
) -> None:
    script = tmp_path / "program.py"
    script.write_text(WORKERS)
    program = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert program.stdout is not None
    assert [program.stdout.readline() for _ in range(2)] == ["working\n"] * 2
    os.killpg(program.pid, signal.SIGINT) if whole_group else program.send_signal(signal.SIGINT)
    # Returns when the workers, which hold the pipes too, have left.
    _, errors = program.communicate(timeout=120)
    assert (program.returncode, errors) == (130, "interrupted: all is kept.\n")
