"""The day with a GPU, without one: every part on tiny shapes, and the program that runs them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_completep.benchmarks.gpu_day import facts, kernels, report, step
from megatron_completep.benchmarks.gpu_day.figures import Figure, Setting, run_part
from megatron_completep.benchmarks.gpu_day.report import PACKAGE, PARTS, TOTAL_SECONDS, Part

ROOT = Path(__file__).resolve().parents[2]
# What a bare GPU machine lacks, and what the wheels named in docs/kernels.md bring to it.
WHEELS = ["pydantic", "pydantic_core", "annotated_types", "typing_inspection", "orjson"]
LACKING = ["zstandard", "tokenizers", "tiktoken", "pyarrow", "transformers", "megatron", "wandb"]


def figures_of(part: str, tmp_path: Path, capsys: Any) -> list[dict[str, Any]]:
    """The figures of a part's trial, in this process."""
    module = importlib.import_module(f"{PACKAGE}.{part}")
    assert run_part(module.measure, module.__doc__, ["--cpu", "--out", str(tmp_path)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("part", [part.name for part in PARTS])
def test_every_part_runs_on_a_cpu(part: str, tmp_path: Path, capsys: Any) -> None:
    rows = figures_of(part, tmp_path, capsys)
    assert rows
    assert [row for row in rows if row.get("passed") is False] == []
    for row in rows:
        assert {"figure", "measured", "expected", "unit"} <= row.keys()
    names = " ".join(row["figure"] for row in rows)
    for words in {
        "facts": ["machine", "copy", "float32 added", "attention default", "in two calls, rate"],
        "kernels": ["kernel tests that failed"],
        "step": ["plain over ours", "ours again", "twice the tokens", "pure bf16", "peak memory"],
        "layouts": ["float32 beside float64", "trace completep", "tensor 2, sequence"],
        "graph": ["states that differ", "gain"],
        "bench": ["residual rmsnorm backward", "adamw", "cross-entropy forward + backward"],
    }[part]:
        assert words in names, words
    # Where results are fetched from another machine, few files are: the log and two pages besides.
    assert len(list(tmp_path.rglob("*"))) <= 3


class OnKnownDevice(Setting):
    """A trial whose device is taken for one of which figures are expected."""

    @property
    def device_name(self) -> str:
        return "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (facts, ["copy", "product tiny, forward", "node", "backward"]),
        (step, ["ours, step", "ours, MFU", "peak memory", "plain over ours", "pure bf16, MFU"]),
    ],
)
def test_what_is_expected_of_a_known_device_stands_beside_what_was_measured(
    module: Any, names: list[str], tmp_path: Path
) -> None:
    said: list[Figure] = []
    deadline = time.monotonic() + 1000
    module.measure(OnKnownDevice(torch.device("cpu"), tmp_path, deadline, said.append, trial=True))
    for name in names:
        found = [figure for figure in said if name in figure.name]
        assert found and all(figure.expected is not None for figure in found), name


def part_of(program: str, name: str = "facts", seconds: float = 10) -> Part:
    return Part(name, seconds, "", (sys.executable, "-c", program))


def figure(name: str, **fields: Any) -> str:
    return f"print({json.dumps(json.dumps({'figure': name, **fields}))}, flush=True)"


def run(tmp_path: Path, *parts: Part, seconds: float = 60) -> tuple[list[Any], list[Any]]:
    """The outcomes, and the lines that were said."""
    lines: list[str] = []
    outcomes = report.run_parts(parts, tmp_path, seconds, os.environ, ROOT, lines.append)
    return outcomes, [json.loads(line) for line in lines]


def test_figures_are_said_and_everything_else_is_logged(tmp_path: Path) -> None:
    program = f"print('a word'); {figure('copy', measured=2.5, expected=3, unit='TB/s')}"
    outcomes, lines = run(tmp_path, part_of(program))
    assert lines[0] == {
        "part": "facts",
        "figure": "copy",
        "measured": 2.5,
        "expected": 3,
        "unit": "TB/s",
    }
    assert [outcome.problem for outcome in outcomes] == [""]
    assert "a word" in (tmp_path / "log.txt").read_text()
    report.write_report(outcomes, tmp_path, {"device": "Test GPU", "date": "today"})
    assert "| copy | 2.5 TB/s | 3 |" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["parts"][0]["rows"][0]["measured"]


def test_a_second_call_into_the_same_folder_keeps_the_parts_of_the_first(tmp_path: Path) -> None:
    def call(name: str, measured: float, device: str = "Test GPU", date: str = "today") -> None:
        rows = [{"figure": "copy", "measured": measured}]
        outcome = report.Outcome(name, 1.0, "", rows)
        report.write_report([outcome], tmp_path, {"device": device, "date": date})

    def parts(file: str = "report.json") -> dict[str, float]:
        written = json.loads((tmp_path / file).read_text())
        return {part["name"]: part["rows"][0]["measured"] for part in written["parts"]}

    call("graph", 1.0)
    call("facts", 2.0, date="tomorrow")
    assert list(parts().items()) == [("facts", 2.0), ("graph", 1.0)]
    assert "## facts" in (tmp_path / "report.md").read_text()
    call("graph", 3.0)
    assert parts() == {"facts": 2.0, "graph": 3.0}
    call("graph", 4.0, device="another")
    assert parts() == {"graph": 4.0}
    assert parts("report_1.json") == {"facts": 2.0, "graph": 3.0}
    assert (tmp_path / "report_1.md").exists()
    (tmp_path / "report_1.json").rename(tmp_path / "report_2.json")
    call("facts", 5.0)
    assert parts("report_1.json") == {"graph": 4.0}
    assert parts("report_2.json") == {"facts": 2.0, "graph": 3.0}
    call("of another version", 6.0)
    assert list(parts()) == ["facts", "of another version"]


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("import sys; sys.exit('a reason')", "a reason"),
        ("print('no figure')", "no figure"),
        (f"{figure('copy', measured=1)}; import nothing_like_it", "No module named"),
    ],
)
def test_a_part_that_fails_does_not_stop_the_next(
    tmp_path: Path, program: str, problem: str
) -> None:
    good = part_of(figure("copy", measured=1, expected=1), "bench")
    outcomes, lines = run(tmp_path, part_of(program), good)
    assert problem in outcomes[0].problem
    assert outcomes[1].problem == "" and len(outcomes[1].rows) == 1
    assert lines[-1]["part"] == "bench"


def test_a_part_that_overruns_is_ended_with_what_it_started_and_the_next_runs(
    tmp_path: Path,
) -> None:
    child = "import time; time.sleep(600)"
    program = (
        f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); "
        f"{figure('copy', measured=1)}; child.wait()"
    )
    good = part_of(figure("copy", measured=1), "bench", seconds=1000)
    outcomes, _ = run(tmp_path, part_of(program, seconds=100), good, seconds=66)
    assert outcomes[0].problem.startswith("stopped after") and len(outcomes[0].rows) == 1
    assert outcomes[1].problem == ""
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):  # the kernel ends it a moment later
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("what the part started is still there")


def test_a_part_that_ends_early_leaves_its_time_to_those_behind_it() -> None:
    now = 0.0
    given = report.limits(PARTS, TOTAL_SECONDS, lambda: now)
    first = next(given)
    assert PARTS[0].seconds <= first < 1.1 * PARTS[0].seconds
    now += 1.0
    second = next(given)
    left = sum(part.seconds for part in PARTS[1:])
    assert second == pytest.approx(PARTS[1].seconds * (TOTAL_SECONDS - 1) / left)
    now = 10 * TOTAL_SECONDS
    assert next(given) == report.LEAST_SECONDS
    assert sum(part.seconds for part in PARTS) <= TOTAL_SECONDS < 10 * 60


def test_the_last_line_says_what_to_do_now(tmp_path: Path) -> None:
    outcomes, _ = run(
        tmp_path,
        part_of(figure("copy", measured=1, passed=False)),
        part_of("import nothing_like_it", "step"),
        part_of("import sys; sys.exit(9)", "graph"),
    )
    advice = report.what_now(outcomes)
    assert "wheels" in advice and "--parts step" in advice
    assert "mend it, then run --parts graph" in advice
    assert "facts: copy" in advice
    assert "tune_kernels" not in advice
    assert "tune_kernels" in report.what_now(outcomes[:1])
    assert report.what_now([], trial=True).startswith("The trial passed")


@pytest.mark.parametrize(
    ("measured", "goal", "passed"),
    [
        (1.06, {"at_least": 1.05}, True),
        (1.04, {"at_least": 1.05}, False),
        (float("nan"), {"at_least": 1.05}, False),
        (2.0, {"at_most": 1}, False),
        (2.0, {}, None),
        (None, {"failed": "no time"}, False),
    ],
)
def test_a_figure_reaches_its_goal_or_not(
    measured: float, goal: dict[str, Any], passed: bool | None
) -> None:
    figure_with_goal = Figure("step", measured, "ms", **goal)
    assert figure_with_goal.passed is passed
    assert json.loads(figure_with_goal.to_json()).get("passed") is passed


def test_what_pytest_says_becomes_figures() -> None:
    lines = [
        "FAILED tests/kernels/test_adamw.py::test_it - assert 1 == 2",
        "ERROR tests/kernels/test_swiglu.py",
        "1 failed, 470 passed, 3 skipped, 1 error in 52.11s",
        "",
    ]
    total, *failed = kernels.read(lines, "", 52.0)
    assert (total.measured, total.passed, total.details["passed"]) == (2, False, 470)
    assert [row.name for row in failed] == [
        "tests/kernels/test_adamw.py::test_it",
        "tests/kernels/test_swiglu.py",
    ]
    (stopped,) = kernels.read(lines[:1], "stopped after 90 s", 90.0)
    assert stopped.failed == "stopped after 90 s"
    (silent,) = kernels.read([], "", 1.0)
    assert silent.passed is False


def test_kernel_tests_leave_out_what_needs_no_device() -> None:
    words = kernels.command(trial=False)
    assert "timeout_method=signal" in words
    for name in kernels.LEFT_OUT:
        assert (ROOT / "tests/kernels" / name).exists()
        assert f"tests/kernels/{name}" in words
    assert (ROOT / kernels.TRIAL).exists()


@pytest.mark.parametrize(
    ("parts", "lacking"),
    [
        (["report", "facts", "kernels", "bench"], [*WHEELS, *LACKING]),
        pytest.param([part.name for part in PARTS], LACKING, marks=pytest.mark.slow),
    ],
)
def test_parts_need_no_package_that_a_bare_gpu_machine_lacks(
    parts: list[str], lacking: list[str]
) -> None:
    modules = [f"{PACKAGE}.{part}" for part in parts]
    program = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({lacking}))\n"  # None: the import is refused
        f"for name in {modules}: importlib.import_module(name)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("tool", ["gpu_report.py", "tune_kernels.py"])
def test_without_a_gpu_the_tools_say_so_in_one_line(tool: str) -> None:
    answer = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: no GPU is visible to torch")
    assert answer.stderr.count("\n") == 1


def test_the_tool_runs_the_parts_that_are_asked_for_into_the_folder_that_is_named(
    tmp_path: Path,
) -> None:
    words = ["--cpu", "--parts", "facts", "--seconds", "120", "--out", str(tmp_path / "out")]
    answer = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_report.py"), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    *figures, last = [json.loads(line) for line in answer.stdout.splitlines()]
    assert {row["part"] for row in figures} == {"facts"}
    assert "The trial passed" in last["do_now"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "log.txt",
        "report.json",
        "report.md",
    ]
