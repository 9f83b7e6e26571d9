"""The GPU report: kernel tests, kernel benchmark and training benchmark of one machine.

It is written under a folder named by the device. Every part is a program of its own under a time
limit, so that one that hangs or cannot run (a package is missing) is reported and the others still
run. Needs torch and Triton only: a GPU machine without a network may lack what the trainer needs.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_completep.benchmarks.kernel_report import folder_name

Say = Callable[[str], None]
KERNEL_BENCHMARK = "kernel benchmark"
TOTAL_SECONDS = 530  # the whole report, in less than nine minutes
LEAST_SECONDS = 10.0  # of a part, however little time is left

KERNEL_TEST_OPTIONS = "-q --maxfail=20 -p no:cacheprovider tests/kernels"
TRAINING_OPTIONS = (
    "--json --device cuda --precision bf16 --layers 12 --hidden 1024 --heads 16 --sequence 1024 "
    "--vocabulary 50304"
)


@dataclass(frozen=True)
class Part:
    """One program of the report.

    share: which share of the time left at its start it may take. json_output: it prints one JSON
    object on stdout, and its log on stderr.
    """

    name: str
    command: tuple[str, ...]
    share: float
    json_output: bool = True


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    result: its JSON object, where it prints one. summary: its last line, or why there is no result.
    """

    name: str
    command: str
    passed: bool
    seconds: float
    summary: str
    result: Mapping[str, Any] = field(default_factory=dict)


def parts(folder: Path, python: str = sys.executable) -> list[Part]:
    """The parts in their order; each gets its share of the time that the ones before have left."""
    # A share counts from the start of its part, so a part that ends early leaves its time to the
    # ones after it.
    test_command = (python, "-m", "pytest", *KERNEL_TEST_OPTIONS.split(), "-m", "not slow")
    kernel_options = ("--out", str(folder), "--seconds", "190", "--json")
    kernel_command = (python, "tools/benchmark_kernels.py", *kernel_options)
    training_command = (python, "tools/benchmark_training.py", *TRAINING_OPTIONS.split())
    return [
        Part("kernel tests", test_command, 0.45, json_output=False),
        Part(KERNEL_BENCHMARK, kernel_command, 0.8),
        Part("training benchmark", training_command, 0.95),
    ]


def run_part(
    part: Part, root: Path, limit: float, environment: Mapping[str, str], say: Say
) -> Outcome:
    """Run one part with `root` as its working folder, for at most `limit` seconds."""
    say(f"{part.name}: {' '.join(part.command)} (at most {limit:.0f} s)")
    start = time.monotonic()
    exit_code: int | None
    # A part that fails or is stopped is a result of the report, so neither raises.
    try:
        finished = subprocess.run(
            part.command,
            cwd=root,
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
        exit_code = finished.returncode
        output = finished.stdout
        log = finished.stderr
    except subprocess.TimeoutExpired as stopped:
        exit_code = None
        output = _decoded(stopped.stdout)
        log = _decoded(stopped.stderr)
    seconds = time.monotonic() - start

    # A benchmark that prints no object has measured nothing, whatever its exit code says.
    result = _last_object(output) if part.json_output else {}
    passed = exit_code == 0 and (bool(result) or not part.json_output)

    # Where stdout holds JSON, what a person wants to read stands on stderr, and the reverse.
    streams = [log, output] if part.json_output else [output, log]
    summary = _last_line(streams) if exit_code is not None else f"stopped after {limit:.0f} s"
    verdict = "passed" if passed else "FAILED"
    say(f"{part.name}: {verdict} in {seconds:.0f} s: {summary}")
    return Outcome(part.name, " ".join(part.command[1:]), passed, seconds, summary, result)


def _decoded(output: str | bytes | None) -> str:
    """The output of a program that was stopped: bytes even where text was asked for, or None."""
    if isinstance(output, bytes):
        return output.decode(errors="replace")
    return output or ""


def _last_line(streams: Sequence[str]) -> str:
    """The last line of the first stream that holds any."""
    for stream in streams:
        lines = stream.strip().splitlines()
        if lines:
            return lines[-1]
    return "no output"


def _last_object(output: str) -> dict[str, Any]:
    """The last line that is a JSON object; {} without one."""
    for line in reversed(output.strip().splitlines()):
        # config/json_text.py would import pydantic, which may be missing on this machine.
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(parsed, dict):
            return parsed
    return {}


def make_report(
    root: Path,
    environment: Mapping[str, str],
    device: Mapping[str, Any],
    say: Say,
    run: Sequence[Part] | None = None,
) -> Path:
    """Run every part, then write report.json and report.md beside what the parts have written.

    run: the parts, by default those of `parts`. Returns the folder of the report.
    """
    deadline = time.monotonic() + TOTAL_SECONDS
    folder = root / "docs" / "benchmarks" / folder_name(str(device["name"]))
    folder.mkdir(parents=True, exist_ok=True)

    outcomes = []
    for report_part in parts(folder) if run is None else run:
        # Even a part that comes when the time is up gets a chance to say what it lacks.
        seconds_left = deadline - time.monotonic()
        limit = max(LEAST_SECONDS, report_part.share * seconds_left)
        outcomes.append(run_part(report_part, root, limit, environment, say))

    records = [asdict(outcome) for outcome in outcomes]
    report = {"device": dict(device), "parts": records}
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    page = markdown(device, outcomes, (folder / "kernels.md").exists())
    (folder / "report.md").write_text(page)
    return folder


def passed(folder: Path) -> bool:
    """Whether all parts of the report in this folder passed."""
    report = json.loads((folder / "report.json").read_text())
    return all(outcome["passed"] for outcome in report["parts"])


def describe_device(torch: Any, triton_version: str) -> dict[str, Any]:
    """What the figures depend on: the current GPU and the versions of the software."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def markdown(device: Mapping[str, Any], outcomes: Sequence[Outcome], has_kernels: bool) -> str:
    """The report as a page: what ran, then a table of every part that returned rows.

    has_kernels: the kernels have a page of their own, so their rows are not repeated here.
    """
    memory = f"{device['memory_bytes'] / 2**30:.0f} GiB"
    setting = (
        f"{device['date']}; {memory}, {device['processors']} multiprocessors; "
        f"torch {device['torch']}, triton {device['triton']}, "
        f"CUDA {device['cuda']}, Python {device['python']}. "
        "Made by `make gpu-report`; every figure was measured in one run."
    )
    overview = [
        {
            "part": outcome.name,
            "passed": outcome.passed,
            "seconds": round(outcome.seconds),
            "summary": outcome.summary,
        }
        for outcome in outcomes
    ]
    lines = [f"# {device['name']}", "", setting, "", *_table(overview)]
    if has_kernels:
        pages = "[kernels.md](kernels.md), [kernels.png](kernels.png)"
        lines += ["", f"Every kernel, with its baselines: {pages}."]

    for outcome in outcomes:
        if has_kernels and outcome.name == KERNEL_BENCHMARK:
            continue
        for key, rows in _tables_of(outcome.result):
            # Nested figures, such as those of both programs of a comparison, become columns.
            flat_rows = [_flat(row) for row in rows]
            lines += ["", f"## {outcome.name}: {key}", "", *_table(flat_rows)]
    return "\n".join(lines) + "\n"


def _tables_of(result: Mapping[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The entries of a result that are non-empty lists of objects, which a table can show."""
    for key, rows in result.items():
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            yield key, rows


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a b": 1}, at any depth."""
    flat: dict[str, Any] = {}
    for key, entry in row.items():
        if isinstance(entry, Mapping):
            flat |= _flat(entry, f"{prefix}{key} ")
        else:
            flat[f"{prefix}{key}"] = entry
    return flat


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a Markdown table; its columns are all keys of the rows, as they appear."""
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)

    lines = [_table_row(list(columns)), "|" + "---|" * len(columns)]
    for row in rows:
        lines.append(_table_row([_cell(row.get(column)) for column in columns]))
    return lines


def _table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(entry: Any) -> str:
    if isinstance(entry, float):
        return f"{entry:.4g}"
    if entry is None:
        return ""
    return str(entry).replace("|", "/")  # a bar would begin another column
