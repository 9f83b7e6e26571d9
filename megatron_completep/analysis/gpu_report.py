"""The GPU report: kernel tests, kernel benchmark and training benchmark on one machine, written under a folder named by the device.

Every part is a program of its own under a time limit, so that one that hangs or cannot run (a package is missing) is reported and
the others still run. Imports torch and the standard library only; pictures need matplotlib and are left out without it.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Say = Callable[[str], None]
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


def parts(python: str = sys.executable) -> list[Part]:
    """The parts in their order; each gets what time the ones before have left."""
    training = ("--device", "cuda", "--precision", "bf16", "--layers", "12", "--hidden", "1024", "--heads", "16", "--sequence", "1024")
    return [
        Part(
            "kernel tests", (python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/kernels", "-m", "not slow"), 0.45, False
        ),
        Part("kernel benchmark", (python, "tools/benchmark_kernels.py", "--json"), 0.75),
        Part("training benchmark", (python, "tools/benchmark_training.py", "--json", *training, "--vocabulary", "50304"), 0.95),
    ]


def run_part(part: Part, root: Path, limit: float, environment: Mapping[str, str], say: Say) -> Outcome:
    """Run one part with `root` as its folder, at most `limit` seconds."""
    say(f"{part.name}: {' '.join(part.command)} (at most {limit:.0f} s)")
    start = time.monotonic()
    try:
        done = subprocess.run(part.command, cwd=root, env=dict(environment), capture_output=True, text=True, timeout=limit, check=False)
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
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            return value
    return {}


def make_report(root: Path, environment: Mapping[str, str], device: Mapping[str, Any], say: Say, run: Sequence[Part] | None = None) -> Path:
    """Run every part, write report.json, report.md and pictures; returns the folder."""
    deadline = time.monotonic() + TOTAL_SECONDS
    outcomes = []
    for part in parts() if run is None else run:
        outcomes.append(run_part(part, root, max(LEAST_SECONDS, part.share * (deadline - time.monotonic())), environment, say))
    folder = root / "docs" / "benchmarks" / folder_name(str(device["name"]))
    folder.mkdir(parents=True, exist_ok=True)
    report = {"device": dict(device), "parts": [asdict(outcome) for outcome in outcomes]}
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    picture = draw(kernel_rows(outcomes), folder / "kernels.png")
    (folder / "report.md").write_text(markdown(device, outcomes, picture))
    return folder


def passed(folder: Path) -> bool:
    return all(part["passed"] for part in json.loads((folder / "report.json").read_text())["parts"])


def folder_name(device: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


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


def kernel_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The rows of the kernel benchmark, if it ran: one a kernel, size and implementation."""
    return [row for outcome in outcomes if outcome.name == "kernel benchmark" for row in outcome.result.get("rows", [])]


def markdown(device: Mapping[str, Any], outcomes: Sequence[Outcome], picture: bool) -> str:
    """The report as a page: what ran, then a table of every part that gave rows."""
    memory = f"{device['memory_bytes'] / 2**30:.0f} GiB"
    lines = [f"# {device['name']}", ""]
    lines.append(
        f"{device['date']}; {memory}, {device['processors']} multiprocessors; torch {device['torch']}, triton {device['triton']}, "
    )
    lines[-1] += f"CUDA {device['cuda']}, Python {device['python']}. Made by `make gpu-report`; every figure was measured in one run."
    lines += ["", *_table([{"part": o.name, "passed": o.passed, "seconds": round(o.seconds), "summary": o.summary} for o in outcomes])]
    for outcome in outcomes:
        for key, rows in outcome.result.items():
            if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
                lines += ["", f"## {outcome.name}: {key}", "", *_table([_flat(row) for row in rows])]
    if picture:
        lines += ["", "![Bandwidth of each kernel against its size](kernels.png)"]
    return "\n".join(lines) + "\n"


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= _flat(value, f"{prefix}{key} ") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    body = ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "/")


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Bandwidth over the position in the sweep, one panel a kernel, with the line of a copy; False where nothing can be drawn."""
    rows = [row for row in rows if row.get("gb_per_s")]
    if not rows or importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(str(row["kernel"]) for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 4), squeeze=False, sharey=True)
    for axis, name in zip(axes[0], names, strict=True):
        own = [row for row in rows if row["kernel"] == name]
        sizes = list(dict.fromkeys(str(row["size"]) for row in own))
        for implementation in dict.fromkeys(str(row["implementation"]) for row in own):
            points = [(sizes.index(str(r["size"])), r["gb_per_s"]) for r in own if str(r["implementation"]) == implementation]
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=implementation)
        copies = [row["copy_gb_per_s"] for row in own if row.get("copy_gb_per_s")]
        if copies:
            axis.axhline(max(copies), linestyle="--", color="grey", label="copy")
        axis.set_title(name, fontsize=9)
        axis.set_xticks(range(len(sizes)), sizes, rotation=60, fontsize=6)
        axis.legend(fontsize=6)
    axes[0][0].set_ylabel("floor bytes / time, GB/s")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
