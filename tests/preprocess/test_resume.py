"""kill -9 at random moments: the next run goes on and ends with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_completep.data.indexed import IndexedDataset

ROOT = Path(__file__).parents[2]

# The tool's own run with small, slow blocks, so that each kill meets the work at another place.
# Its arguments: the number of workers, the inputs' folder, the output.
PROGRAM = """
import sys, time
from megatron_completep.preprocess import encode, report
from megatron_completep.preprocess.run import preprocess
from megatron_completep.preprocess.settings import PreprocessSettings, TokenizerChoice
original = encode.Encoder.encode
def slow(self, block):
    time.sleep(0.001)
    return original(self, block)
encode.Encoder.encode = slow  # in the workers too: they import this file as their main module
if __name__ == "__main__":
    report._draw = lambda *_: None
    workers, inputs, output = sys.argv[1:]
    settings = PreprocessSettings(
        (inputs,), output, TokenizerChoice("bytes"), append_eod=True, deduplicate=True
    )
    done = preprocess(settings, workers=int(workers), block_bytes=1000, log_interval=10**9)
    print(done["status"])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    generator = random.Random(1)
    (folder / "in").mkdir()
    (folder / "program.py").write_text(PROGRAM)
    for name in "abc":
        lines = [
            f'{{"text": "{generator.randrange(600)} {"x" * generator.randrange(300)}"}}\n'
            for _ in range(700)
        ]
        (folder / "in" / f"{name}.jsonl").write_text("".join(lines))
    return folder


def start(folder: Path, workers: int, name: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        str(folder / "program.py"),
        str(workers),
        str(folder / "in"),
        str(folder / name),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finished_blocks(work: Path) -> int:
    try:
        return sum(name.read_bytes().count(b"\n") for name in work.glob("*.journal"))
    except FileNotFoundError:  # the run has just ended and deletes its work
        return 0


def output_bytes(folder: Path, name: str) -> list[bytes]:
    return [
        (folder / f"{name}_text_document.{suffix}").read_bytes()
        for suffix in ("bin", "idx", "json")
    ]


@pytest.mark.parametrize("most_kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_many_times_the_bytes_are_those_of_a_run_never_killed(
    folder: Path, most_kills: int
) -> None:
    assert start(folder, 1, "whole").communicate()[0] == "complete\n"
    generator = random.Random(2)
    kills = 0
    resumed_blocks = set()
    while kills < most_kills:
        process = start(folder, 2 if kills % 4 == 0 else 1, "killed")
        work = folder / "killed.preprocess"
        target = finished_blocks(work) + generator.randrange(60)
        while process.poll() is None and finished_blocks(work) < target:
            time.sleep(0.001)
        if process.poll() is None:
            # The whole group, or the parent alone: its workers must then leave by themselves.
            (os.killpg if generator.random() < 0.5 else os.kill)(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()  # returns when the last process that holds the pipe has left
        resumed_blocks.add(finished_blocks(work))
        if (folder / "killed_text_document.idx").exists():
            assert output_bytes(folder, "killed") == output_bytes(folder, "whole")
            for name in folder.glob("killed_*"):
                name.unlink()
    assert start(folder, 3, "killed").communicate()[0] == "complete\n"
    assert output_bytes(folder, "killed") == output_bytes(folder, "whole")
    assert not IndexedDataset(folder / "killed_text_document").problems()
    assert not (folder / "killed.preprocess").exists()
    assert len(resumed_blocks) > 0.4 * most_kills, (
        "the kills must have met the work at different places"
    )


def test_a_killed_worker_ends_the_run_with_a_message_and_its_work_is_kept(folder: Path) -> None:
    program = """
import os, signal, sys
from megatron_completep.preprocess import encode
from megatron_completep.preprocess.run import preprocess
from megatron_completep.preprocess.settings import PreprocessSettings, TokenizerChoice
from megatron_completep.errors import exit_on_user_error
original = encode.Encoder.encode
def deadly(self, block):
    if block.part == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, block)
encode.Encoder.encode = deadly  # in the workers too: they import this file as their main module
def main():
    settings = PreprocessSettings((sys.argv[1],), sys.argv[2], TokenizerChoice("bytes"))
    preprocess(settings, workers=2, block_bytes=200)
if __name__ == "__main__":
    exit_on_user_error(main)
"""
    (folder / "deadly.py").write_text(program)
    command = [
        sys.executable,
        str(folder / "deadly.py"),
        str(folder / "in"),
        str(folder / "deadly"),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 2
    assert "a worker was killed by signal 9 at work on this file" in done.stderr
    assert "a.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
    assert finished_blocks(folder / "deadly.preprocess") >= 30
