"""What a run reports, and that a report outlives kills, resumes and broken loggers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_completep.telemetry.metrics import (
    METRICS,
    ConsoleLines,
    MetricsFile,
    describe,
    open_sinks,
    read_metrics,
)
from tests.support.runs import tiny_config

ROOT = Path(__file__).resolve().parents[2]


def row(step: int, **changes: Any) -> dict[str, Any]:
    values = {
        "step": step,
        "loss": 4.0,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "skipped": False,
        "tokens": 128 * step,
        "tokens_per_second": 1000.0,
        "mfu": None,
        "step_seconds": 0.128,
        "data_wait_seconds": 0.0,
        "memory_bytes": 2**30,
    }
    return {**values, **changes}


def write_steps(path: Path, steps: int) -> None:
    file = MetricsFile(path, 0, print)
    for step in range(1, steps + 1):
        file.write(row(step))
    file.close()


def test_a_line_nested_without_end_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 2)
    with path.open("ab") as file:
        file.write(b'{"step": 3, "a": ' + b"[" * 2000 + b"]" * 2000 + b"}\n")
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    MetricsFile(path, 2, print).close()  # what a resume does with it
    assert [r["step"] for r in read_metrics(path)] == [1, 2]


def test_floats_read_back_bit_for_bit(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, math.pi]
    file = MetricsFile(tmp_path / "metrics.jsonl", 0, print)
    for step, value in enumerate(values, start=1):
        file.write(row(step, loss=value))
    assert [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")] == values
    assert [float(f"{value:.6g}") for value in values] != values  # fewer digits would be noticed


def test_a_value_that_is_not_finite_is_null(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl", 0, print).write(
        row(1, loss=math.nan, grad_norm=math.inf)
    )
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert '"loss": null' in line and '"grad_norm": null' in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_resumed_run_cuts_the_file_at_its_step_and_drops_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 5)
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert len(path.read_bytes().splitlines()) == 6  # the torn line is there before
    # A reader meanwhile is not disturbed by it.
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5]
    file = MetricsFile(path, 3, print)
    file.write(row(4, loss=7.0))
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [
        (1, 4.0),
        (2, 4.0),
        (3, 4.0),
        (4, 7.0),
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "torn",
    ['{"step": 4, "loss": 4.0}', '{"step": 4', "null\n", "[4]\n", '{"step": "4"}\n', "\x00\x00\n"],
)
def test_a_line_that_is_no_whole_row_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 3)
    with path.open("a") as file:
        file.write(torn)
    MetricsFile(path, 10, print)
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]


def test_rows_that_a_full_disk_refuses_wait_and_are_written_later(tmp_path: Path) -> None:
    said: list[str] = []
    file = MetricsFile(tmp_path / "metrics.jsonl", 0, said.append)
    file.write(row(1))
    whole, file._file = file._file, open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        file._file.write(b"x")
    file.write(row(2))
    file.write(row(3))
    file._file.close()
    file._file = whole
    file.write(row(4))
    file.close()
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert said == [
        (
            "warning: /dev/full cannot be written: No space left on device. Rows wait in memory; "
            "training goes on."
        )
    ]


def test_the_console_gets_the_first_step_and_a_line_an_interval_and_one_at_the_end() -> None:
    said: list[str] = []
    lines = ConsoleLines(4, 10, said.append)
    for step in range(1, 11):
        lines.write(row(step))
    assert [line.split("  loss")[0].split()[-1] for line in said] == [
        "1/10",
        "4/10",
        "8/10",
        "10/10",
    ]


def test_a_console_line_averages_its_interval() -> None:
    rows = [
        row(1, loss=2.0, tokens_per_second=1000.0, step_seconds=1.0, mfu=0.25),
        row(
            2, loss=4.0, tokens_per_second=500.0, step_seconds=2.0, mfu=0.125, data_wait_seconds=0.6
        ),
        row(3, loss=math.nan, skipped=True, tokens_per_second=1000.0, step_seconds=1.0, mfu=0.25),
    ]
    line = describe(rows, 63)
    for part in (
        "step  3/63",
        "loss  3.0000",
        "lr 1.00e-03",
        "750 tokens/s",
        "mfu 18.8 %",
        "waiting for data 15 %",
        "1 skipped",
        "1:20 left",
    ):
        assert part in line


def test_only_what_is_asked_for_is_opened(tmp_path: Path) -> None:
    sinks = open_sinks(tiny_config(tmp_path, output="."), 0, print)
    assert [type(sink).__name__ for sink in sinks] == ["MetricsFile", "ConsoleLines"]
    assert not (tmp_path / "tensorboard").exists()


def test_a_console_that_takes_no_more_stops_nothing() -> None:
    program = """
import sys
from megatron_completep.run.console import say_on_stdout
from megatron_completep.errors import exit_on_user_error
say_on_stdout("one")
say_on_stdout("two")
exit_on_user_error(lambda: 75)
"""
    with open("/dev/full", "w") as full:
        run = [sys.executable, "-c"]
        given_up = subprocess.run(
            [*run, program], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
        plain = program.replace(
            "from megatron_completep.run.console import say_on_stdout", "say_on_stdout = print"
        )
        stopped = subprocess.run(
            [*run, plain], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (given_up.returncode, given_up.stderr) == (75, "")
    assert stopped.returncode != 75  # print alone loses the exit code


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_metrics_file_that_is_removed_under_the_run_is_begun_anew_with_a_line(tmp_path, what):
    said: list[str] = []
    path = tmp_path / "run" / METRICS
    path.parent.mkdir()
    metrics = MetricsFile(path, 0, said.append)
    metrics.write({"step": 1})
    assert said == []  # the control
    path.unlink()
    if what == "folder":
        path.parent.rmdir()
    for step in (2, 3):
        metrics.write({"step": step})
    metrics.close()
    assert [row["step"] for row in read_metrics(path)] == [2, 3]
    assert said == [
        f"warning: {path} was removed while the run was writing it; a new file starts with the "
        "next row"
    ]
