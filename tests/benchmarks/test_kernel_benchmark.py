"""The kernel benchmark: a whole run on tiny shapes on the CPU,
the numbers it derives, and what it says without a GPU.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_completep.benchmarks import kernel_benchmark
from megatron_completep.benchmarks.kernel_benchmark import SMOKE, Measurement, measure, run, speedup
from megatron_completep.benchmarks.kernel_cases import Case
from megatron_completep.benchmarks.kernel_report import folder_name, write_report

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark_kernels.py"
CPU = torch.device("cpu")


def measurement(implementation, p50, columns=64):
    return Measurement(
        "norm",
        implementation,
        8,
        columns,
        p50,
        p50,
        p50,
        1000,
        1.0,
        50.0,
        None,
        None,
        None,
        None,
        None,
    )


def prepared(work):
    return lambda: work


def test_a_trial_measures_every_kernel_and_ours_is_right(tmp_path):
    found, left_out = run(dataclasses.replace(SMOKE, dtype=torch.float32), CPU, lambda line: None)
    assert not left_out
    ours = [m for m in found if m.implementation == "ours"]
    assert len({m.kernel for m in ours}) == 26
    assert all(m.floor_bytes > 0 and m.percent_of_copy > 0 for m in ours)
    assert all(len([m for m in found if m.kernel == one.kernel]) >= 2 for one in ours), (
        "a kernel has no baseline"
    )
    assert all(m.max_error is None or m.max_error < 1e-5 for m in ours)
    assert sum(m.max_error is not None for m in ours) >= 7
    paths = write_report(found, ["something"], {"device": "cpu"}, tmp_path)
    assert (
        json.loads(paths[0].read_text())["measurements"][0]["kernel"] == "residual rmsnorm forward"
    )
    assert "## residual rmsnorm backward" in paths[1].read_text()
    assert "- something" in paths[1].read_text()
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_in_the_time_is_named():
    found, left_out = run(dataclasses.replace(SMOKE, seconds=0.0), CPU, lambda line: None)
    assert not found and "gradient norm 4096 x 1" in left_out


def test_rates_follow_from_the_floor_and_the_copy(monkeypatch):
    times = iter([2.0, 4.0])  # the copy, then ours
    monkeypatch.setattr(kernel_benchmark, "_quantiles", lambda *_: (next(times),) * 3)
    (row,) = measure(Case("x", 1, 1, 8000, {"ours": prepared(lambda: None)}), SMOKE, CPU, print)
    assert row.gigabytes_per_second == pytest.approx(2.0)
    assert row.percent_of_copy == pytest.approx(50.0)


def test_a_failing_baseline_is_reported_and_ours_is_not_excused():
    def fail():
        raise RuntimeError("no such kernel")

    lines: list[str] = []
    broken = {"when prepared": fail, "when called": prepared(fail), "ours": prepared(lambda: None)}
    rows = list(measure(Case("x", 1, 1, 8, broken), SMOKE, CPU, lines.append))
    assert [row.implementation for row in rows] == ["ours"]
    assert lines == [
        "x, when prepared: RuntimeError: no such kernel",
        "x, when called: RuntimeError: no such kernel",
    ]
    with pytest.raises(RuntimeError):
        list(measure(Case("x", 1, 1, 8, {"ours": prepared(fail)}), SMOKE, CPU, lines.append))


def test_speedup_is_the_geometric_mean_and_the_worst_shape():
    rows = [
        measurement("ours", 1.0),
        measurement("eager", 2.0),
        measurement("ours", 1.0, 128),
        measurement("eager", 8.0, 128),
    ]
    assert speedup(rows, "norm", "eager") == pytest.approx((4.0, 2.0))
    assert speedup(rows, "norm", "liger") is None


def test_folder_is_named_by_the_device():
    assert folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_tool_says_so_and_exits_2():
    answer = subprocess.run(
        [sys.executable, TOOL],
        capture_output=True,
        text=True,
        check=False,
        cwd=TOOL.parents[1],
        env=None,
    )
    assert answer.returncode == 2
    assert "needs a GPU" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_torch_compile_starts_afresh_for_every_shape_and_serves_both_directions(monkeypatch):
    """Eight shapes of one function exhaust its recompilations:
    from then on it would run without, and be timed as if with.
    """
    calls: list[str] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append("reset"))
    monkeypatch.setattr(
        torch, "compile", lambda function, dynamic: calls.append("compile") or function
    )
    plan = dataclasses.replace(SMOKE, with_compile=True, dtype=torch.float32)
    found, _ = run(plan, CPU, lambda line: None)
    compiled = {m.kernel for m in found if m.implementation == "torch.compile"}
    assert {
        "residual layernorm backward",
        "swiglu backward",
        "rotary",
        "cross-entropy backward",
        "rmsnorm forward",
    } <= compiled
    assert calls == ["reset", "compile"] * (len(calls) // 2)
    # Residual norms, cross-entropy, activations, norms, rotary, normed and joined heads.
    assert len(calls) // 2 == 2 + 1 + 2 + 2 + 1 + 2
