"""The GPU report: kernel tests, kernel benchmark and training benchmark on one machine, written under a folder named by the device.

Every part is a program of its own under a time limit, so that one that hangs or cannot run (a package is missing) is reported and
the others still run. Needs torch and Triton only: a GPU machine without a network may lack what the trainer needs.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_completep.benchmarks.kernel_report import folder_name

Say = Callable[[str], None]
KERNEL_BENCHMARK = "kernel benchmark"
TOTAL_SECONDS = 530  # the whole report, in less than nine minutes
LEAST_SECONDS = 10.0  # of a part, however little is left


@dataclass(frozen=True)
class Part:
    """One program of the report. `share`: its part of the time that is left when it starts."""

    name: str
    command: tuple[str, ...]
    share: float
    json_output: bool = True


@dataclass(frozen=True)
class Outcome:
    """What a part came to. `result`: its JSON object, where it prints one; `summary`: its last line, or why there is no result."""

    name: str
    command: str
    passed: bool
    seconds: float
    summary: str
    result: Mapping[str, Any] = field(default_factory=dict)


def parts(folder: Path, python: str = sys.executable) -> list[Part]:
    """The parts in their order; each gets what time the ones before have left."""
    training = (
        "--device",
        "cuda",
        "--precision",
        "bf16",
        "--layers",
        "12",
        "--hidden",
        "1024",
        "--heads",
        "16",
        "--sequence",
        "1024",
    )
    return [
        Part(
            "kernel tests",
            (
                python,
                "-m",
                "pytest",
                "-q",
                "--maxfail=20",
                "-p",
                "no:cacheprovider",
                "tests/kernels",
                "-m",
                "not slow",
            ),
            0.45,
            False,
        ),
        Part(
            KERNEL_BENCHMARK,
            (
                python,
                "tools/benchmark_kernels.py",
                "--out",
                str(folder),
                "--seconds",
                "190",
                "--json",
            ),
            0.8,
        ),
        Part(
            "training benchmark",
            (python, "tools/benchmark_training.py", "--json", *training, "--vocabulary", "50304"),
            0.95,
        ),
    ]


def run_part(
    part: Part, root: Path, limit: float, environment: Mapping[str, str], say: Say
) -> Outcome:
    """Run one part with `root` as its folder, at most `limit` seconds."""
    say(f"{part.name}: {' '.join(part.command)} (at most {limit:.0f} s)")
    start = time.monotonic()
    try:
        done = subprocess.run(
            part.command,
            cwd=root,
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
        code, output, log = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as stopped:
        code, output, log = None, _text(stopped.stdout), _text(stopped.stderr)
    seconds = time.monotonic() - start
    result = _last_object(output) if part.json_output else {}
    passed = code == 0 and (bool(result) or not part.json_output)
    first, second = (log, output) if part.json_output else (output, log)
    lines = first.strip().splitlines() or second.strip().splitlines() or ["no output"]
    summary = f"stopped after {limit:.0f} s" if code is None else lines[-1]
    say(f"{part.name}: {'passed' if passed else 'FAILED'} in {seconds:.0f} s: {summary}")
    return Outcome(part.name, " ".join(part.command[1:]), passed, seconds, summary, result)


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _last_object(output: str) -> dict[str, Any]:
    for line in reversed(output.strip().splitlines()):
        try:
            value = json.loads(line)
        except (
            ValueError,
            RecursionError,
        ):  # without config/json_text.py: pydantic may be missing here
            continue
        if isinstance(value, dict):
            return value
    return {}


def make_report(
    root: Path,
    environment: Mapping[str, str],
    device: Mapping[str, Any],
    say: Say,
    run: Sequence[Part] | None = None,
) -> Path:
    """Run every part and write report.json and report.md beside what the parts write themselves; returns the folder."""
    deadline = time.monotonic() + TOTAL_SECONDS
    folder = root / "docs" / "benchmarks" / folder_name(str(device["name"]))
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for part in parts(folder) if run is None else run:
        outcomes.append(
            run_part(
                part,
                root,
                max(LEAST_SECONDS, part.share * (deadline - time.monotonic())),
                environment,
                say,
            )
        )
    report = {"device": dict(device), "parts": [asdict(outcome) for outcome in outcomes]}
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(device, outcomes, (folder / "kernels.md").exists()))
    return folder


def passed(folder: Path) -> bool:
    return all(part["passed"] for part in json.loads((folder / "report.json").read_text())["parts"])


def describe_device(torch: Any, triton_version: str) -> dict[str, Any]:
    """What the figures depend on."""
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
    """The report as a page: what ran, then a table of every part that gave rows (the kernels have a page of their own)."""
    memory = f"{device['memory_bytes'] / 2**30:.0f} GiB"
    lines = [f"# {device['name']}", ""]
    lines.append(
        f"{device['date']}; {memory}, {device['processors']} multiprocessors; torch {device['torch']}, triton {device['triton']}, "
    )
    lines[-1] += (
        f"CUDA {device['cuda']}, Python {device['python']}. Made by `make gpu-report`; every figure was measured in one run."
    )
    lines += [
        "",
        *_table(
            [
                {
                    "part": o.name,
                    "passed": o.passed,
                    "seconds": round(o.seconds),
                    "summary": o.summary,
                }
                for o in outcomes
            ]
        ),
    ]
    if has_kernels:
        lines += [
            "",
            "Every kernel, with its baselines: [kernels.md](kernels.md), [kernels.png](kernels.png).",
        ]
    for outcome in outcomes:
        if has_kernels and outcome.name == KERNEL_BENCHMARK:
            continue
        for key, rows in outcome.result.items():
            if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
                lines += [
                    "",
                    f"## {outcome.name}: {key}",
                    "",
                    *_table([_flat(row) for row in rows]),
                ]
    return "\n".join(lines) + "\n"


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= (
            _flat(value, f"{prefix}{key} ")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    body = ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "/")
