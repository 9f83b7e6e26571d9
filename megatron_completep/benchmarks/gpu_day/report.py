"""Runs the parts of the GPU report one after the other, each under a limit of time.

A part is a program of its own, so one that fails, hangs or lacks a package is a result and the
others still run. The parts stand in the order of what is worth most: whatever ends the day early,
the figures before it are there. Needs torch and Triton alone; some parts need more.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

from megatron_completep.files import write_whole

Say = Callable[[str], None]
Row = Mapping[str, Any]

TOTAL_SECONDS = 570.0  # of all parts
LEAST_SECONDS = 2.0  # of a part, however little time is left: it can say what it lacks
PACKAGE = "megatron_completep.benchmarks.gpu_day"
LOG = "log.txt"


@dataclass(frozen=True)
class Part:
    """One program of the report.

    seconds: its limit where all parts run. question: what it answers.
    """

    name: str
    seconds: float
    question: str
    command: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """The program, without its options."""
        return self.command or (sys.executable, "-m", f"{PACKAGE}.{self.name}")


PARTS = (
    Part("facts", 40, "what the machine is, and what copies, products and attention reach"),
    Part("kernels", 90, "whether the kernels are right: their tests on the device"),
    Part("step", 245, "how long the training step takes, beside the compiled plain model's"),
    Part("layouts", 60, "whether one process, the golden traces and every layout agree"),
    Part("graph", 35, "what a CUDA graph of the step gives small models"),
    Part("bench", 65, "what share of a copy's speed every kernel reaches"),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    problem: why there is no more of it; "" where it ran to its end. rows: its figures, in order.
    """

    name: str
    seconds: float
    problem: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def missed(self) -> list[str]:
        """The figures that failed, or do not reach their goal."""
        return [row["figure"] for row in self.rows if row.get("passed") is False]


def limits(parts: Sequence[Part], seconds: float, clock: Callable[[], float]) -> Iterator[float]:
    """The limit of each part when its turn comes: its share of the time that is left.

    A part that ends early leaves its time to those behind it.
    """
    deadline = clock() + seconds
    for number, part in enumerate(parts):
        share = part.seconds / sum(later.seconds for later in parts[number:])
        yield max(LEAST_SECONDS, share * (deadline - clock()))


def run_parts(
    parts: Sequence[Part],
    folder: Path,
    seconds: float,
    environment: Mapping[str, str],
    root: Path,
    say: Say,
    trial: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run the parts with `root` as working folder, and say every figure as one JSON line.

    folder: where parts write, and all that they print beside figures.
    """
    outcomes = []
    # A day takes several calls, of which each runs what is left.
    with (folder / LOG).open("a") as log:
        for part, limit in zip(parts, limits(parts, seconds, clock), strict=True):
            outcome = run_part(part, folder, limit, environment, root, say, log, trial)
            outcomes.append(outcome)
    return outcomes


def run_part(
    part: Part,
    folder: Path,
    limit: float,
    environment: Mapping[str, str],
    root: Path,
    say: Say,
    log: IO[str],
    trial: bool,
) -> Outcome:
    """Run one part for at most `limit` seconds; say its figures, then how it ended."""
    # The part plans with less, so that what it has measured is said before it is stopped.
    options = ["--out", str(folder), "--seconds", f"{max(1.0, 0.95 * limit - 2):.0f}"]
    if trial:
        options.append("--cpu")
    log.write(f"##### {part.name}, at most {limit:.0f} s\n")
    log.flush()
    # The part writes to the same file by itself: its last line is looked for behind this place.
    started_at = log.tell()
    start = time.monotonic()
    process = subprocess.Popen(
        [*part.words, *options],
        cwd=root,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,  # so that what it starts ends with it
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        _end(process)

    # A timer, as this thread waits for lines of the part, which may never come.
    alarm = threading.Timer(limit, stop)
    alarm.start()
    try:
        rows = [*_rows(process, part.name, say, log)]
        exit_code = process.wait()
    finally:
        alarm.cancel()
        if process.poll() is None:  # the report itself is interrupted
            _end(process)
    seconds = time.monotonic() - start
    problem = ""
    # A part that was stopped has an exit code as well, that of the signal.
    if stopped.is_set():
        problem = f"stopped after {limit:.0f} s"
    elif exit_code != 0 or not rows:
        log.flush()
        problem = _last_line(folder / LOG, started_at) or f"exit code {exit_code}"
    say(json.dumps({"part": part.name, "seconds": round(seconds, 1), "problem": problem}))
    return Outcome(part.name, seconds, problem, rows)


def _end(process: subprocess.Popen[str]) -> None:
    """End the program and everything that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()  # the group has ended already
    process.wait()


def _rows(
    process: subprocess.Popen[str], name: str, say: Say, log: IO[str]
) -> Iterator[dict[str, Any]]:
    """The figures that a part prints, each said when it comes; the log gets other lines."""
    assert process.stdout is not None
    for line in process.stdout:
        row = _figure(line)
        if row is None:
            log.write(line)
            log.flush()
            continue
        say(json.dumps({"part": name, **row}))
        yield row


def _figure(line: str) -> dict[str, Any] | None:
    """A line that is a figure; config/json_text.py would import pydantic, which may be missing."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and "figure" in row else None


def _last_line(path: Path, position: int) -> str:
    """The last line of a file behind a position that is not empty."""
    with path.open(errors="replace") as file:
        file.seek(position)
        lines = [line.strip() for line in file if line.strip()]
    return lines[-1][:300] if lines else ""


def what_now(outcomes: Sequence[Outcome], trial: bool = False) -> str:
    """What somebody does after the report, in a few sentences."""
    sentences = []
    # A part that lacks a package has no defect: it needs wheels, where the others need mending.
    lacking = [outcome.name for outcome in outcomes if "No module named" in outcome.problem]
    broken = [o.name for o in outcomes if o.problem and o.name not in lacking]
    if lacking:
        sentences.append(
            f"Carry the wheels that docs/kernels.md names, then run --parts {' '.join(lacking)}."
        )
    if broken:
        sentences.append(
            f"Read {LOG} for {', '.join(broken)}, mend it, then run --parts {' '.join(broken)}."
        )
    missed = [f"{o.name}: {name}" for o in outcomes for name in o.missed]
    if missed:
        shown = "; ".join(missed[:8])
        more = f"; and {len(missed) - 8} more" if len(missed) > 8 else ""
        sentences.append(f"Explain what failed or missed its goal: {shown}{more}.")
    # The figures of a trial mean nothing, so there is nothing to write down.
    if trial:
        return " ".join(sentences or ["The trial passed: run it on a machine with a GPU."])
    sentences.append(
        "Commit the folder under docs/benchmarks, and write its figures into README.md and "
        "docs/kernels.md beside the goals, misses too."
    )
    if not (lacking or broken):
        sentences.append(
            "With two minutes left: tools/tune_kernels.py --only norm_backward --hidden 4096 "
            "--write, then --parts bench again."
        )
    return " ".join(sentences)


def write_report(outcomes: Sequence[Outcome], folder: Path, setting: Row) -> None:
    """report.json and report.md: these parts, and those of earlier calls that were not run again.

    A report of another device or other versions stays beside it, as report_1.json and so on.
    """
    path = folder / "report.json"
    of_part = _earlier(path, setting) if path.exists() else {}
    if path.exists() and not of_part:
        free = next(n for n in count(1) if not (folder / f"report_{n}.json").exists())
        for written in (path, path.with_suffix(".md")):
            if written.exists():
                written.rename(folder / f"report_{free}{written.suffix}")
    of_part.update({outcome.name: outcome for outcome in outcomes})
    # A part that was renamed since then comes last.
    order = dict.fromkeys([*(part.name for part in PARTS), *of_part])
    together = [of_part[name] for name in order if name in of_part]
    content = {"setting": dict(setting), "parts": [asdict(outcome) for outcome in together]}
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())
    write_whole(path.with_suffix(".md"), page(together, setting).encode())


def _earlier(path: Path, setting: Row) -> dict[str, Outcome]:
    """The parts of a report, by name; none where it is of another setting, or cannot be read."""
    try:
        earlier = json.loads(path.read_bytes())
        if _unchanged(earlier["setting"]) != _unchanged(setting):
            return {}
        return {part["name"]: Outcome(**part) for part in earlier["parts"]}
    except (ValueError, KeyError, TypeError):
        return {}


def _unchanged(setting: Row) -> dict[str, Any]:
    """What two calls of one report have in common."""
    return {key: entry for key, entry in setting.items() if key != "date"}


def page(outcomes: Sequence[Outcome], setting: Row) -> str:
    """The report for a reader: a table a part."""
    questions = {part.name: part.question for part in PARTS}
    lines = [f"# {setting['device']}", ""]
    rest = [f"{key} {entry}" for key, entry in setting.items() if key != "device"]
    lines += [f"{'; '.join(rest)}. Made by `make gpu-report`.", ""]
    lines += ["What was expected is a model's, written before the run; none of it was measured."]
    for outcome in outcomes:
        lines += ["", f"## {outcome.name}: {questions.get(outcome.name, '')}", ""]
        ended = outcome.problem or "ran to its end"
        lines += [f"{outcome.seconds:.0f} s; {ended}.", ""]
        if outcome.rows:
            lines += ["| figure | measured | expected | goal | reached |", "|---|---|---|---|---|"]
            lines += [_table_row(row) for row in outcome.rows]
    return "\n".join(lines) + "\n"


def _table_row(row: Row) -> str:
    measured = row.get("failed") or f"{_cell(row.get('measured'))} {row.get('unit', '')}".strip()
    goals = []
    if "at_least" in row:
        goals.append(f"at least {_cell(row['at_least'])}")
    if "at_most" in row:
        goals.append(f"at most {_cell(row['at_most'])}")
    # A figure without a goal has no entry, and its cell stays empty.
    reached = {True: "yes", False: "**no**"}.get(row.get("passed", ""), "")
    cells = (row["figure"], measured, _cell(row.get("expected")), ", ".join(goals), reached)
    # A bar inside a cell would begin another one.
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def _cell(entry: Any) -> str:
    if entry is None:
        return ""
    return f"{entry:.4g}" if isinstance(entry, float) else str(entry)
