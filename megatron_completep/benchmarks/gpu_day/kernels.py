"""The tests of the kernels, on the device, in several processes.

Example:

    python -m megatron_completep.benchmarks.gpu_day.kernels --out gpu_day

Needs torch, Triton, pytest, pytest-timeout, pytest-xdist and hypothesis. The two files that compile
for GPUs which are not there are left out: that needs no device, and would take its time.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_completep.benchmarks.gpu_day import figures
from megatron_completep.benchmarks.gpu_day.figures import Figure, Setting

ROOT = Path(__file__).resolve().parents[3]
PROCESSES = 12
LEFT_OUT = ("test_model_compilation.py", "test_step_compilation.py")
TRIAL = "tests/kernels/test_control.py"
# A test that hangs is ended alone; the suite's own method would end the process of pytest with it.
OPTIONS = ("-q", "-p", "no:cacheprovider", "-o", "timeout_method=signal", "--maxfail=60")
LONGEST_NAMES = 40  # failed tests that get a line of their own


def measure(setting: Setting) -> None:
    """Run the tests; a figure for their number, and one for each that failed."""
    seconds = max(1.0, setting.seconds_left)
    start = time.monotonic()
    lines: list[str] = []
    process = subprocess.Popen(
        command(setting.trial),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    # Out of time is a result: what was reported until then is read all the same.
    alarm = threading.Timer(seconds, process.kill)
    alarm.start()
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", file=sys.stderr, flush=True)
        lines.append(line.rstrip())
    process.wait()
    alarm.cancel()
    took = time.monotonic() - start
    stopped = f"stopped after {seconds:.0f} s" if took >= seconds else ""
    for figure in read(lines, stopped, took):
        setting.say(figure)


def command(trial: bool) -> list[str]:
    """The command line of pytest; a trial runs one file in one process."""
    pytest = [sys.executable, "-m", "pytest", *OPTIONS]
    if trial:
        return [*pytest, "-p", "no:xdist", TRIAL]
    words = [*pytest, "tests/kernels", "-m", "not slow"]
    for name in LEFT_OUT:
        words += ["--ignore", f"tests/kernels/{name}"]
    if importlib.util.find_spec("xdist") is not None:
        words += ["-n", str(PROCESSES)]
    return words


def read(lines: Sequence[str], stopped: str, seconds: float) -> list[Figure]:
    """What the lines of pytest say: how many tests passed, and which failed."""
    last = next((line for line in reversed(lines) if line), "no output")
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (\w+)", last)}
    failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    if stopped or "passed" not in counts:
        return [Figure("kernel tests", failed=stopped or last[:300])]
    details = {"passed": counts["passed"], "skipped": counts.get("skipped", 0)}
    details["seconds"] = round(seconds)
    figures_of_log = [
        Figure("kernel tests that failed", failed, "tests", 0, at_most=0, details=details)
    ]
    for line in lines:
        match = re.match(r"(?:FAILED|ERROR) (\S+)(?: - (.*))?", line)
        if match and len(figures_of_log) <= LONGEST_NAMES:
            test, reason = match.groups()
            figures_of_log.append(Figure(test, failed=(reason or "failed")[:200]))
    return figures_of_log


if __name__ == "__main__":
    figures.main(measure, __doc__)
