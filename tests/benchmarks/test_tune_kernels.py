"""The tuner of launch parameters, with a clock of our own:
it needs no GPU to show that it keeps the fastest and that launches follow.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_completep.benchmarks import tune_kernels
from megatron_completep.benchmarks.tuning_cases import Tunable
from megatron_completep.kernels import launch, tuned

ROOT = Path(__file__).parents[2]
KEY = ("adamw", 0, 4)


def without_the_interpreter(*program):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, program)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def tunable(candidates, *sizes):
    return Tunable(KEY, tuple(candidates), sizes)


@pytest.mark.parametrize("architecture", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_every_operation_is_tuned_and_launched_as_the_written_table_says(architecture, tmp_path):
    answer = without_the_interpreter(
        Path(__file__).parent / "tune_with_a_clock.py", architecture, tmp_path / "tuned.py"
    )
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    operations = {operation for operation, _, _ in found["entries"]}
    assert operations == set(found["asked"]), (
        "the tuner and the launchers do not speak of the same operations"
    )
    assert operations >= {
        "norm_forward",
        "norm_backward",
        "swiglu_backward",
        "squared_relu_forward",
        "rotary",
        "scaled_add_forward",
        "adamw",
    }
    assert found["launched as wanted"] == found["entries"]
    assert found["launched as before"] == found["wanted what was launched before"]
    assert len(found["launched as before"]) < len(found["entries"]) / 3, (
        "a clock that prefers today's parameters shows nothing"
    )
    assert found["table restored"] and not found["left out"]


def test_the_fastest_over_all_sizes_is_chosen():
    """Geometric means: (1, 16) loses to (3, 3);
    and a clock that is not asked what is launched chooses the first.
    """

    def sizes(times):
        return [
            lambda k=k: (
                lambda: times[
                    launch.block_shape("adamw", torch.float32, torch.device("cpu")).block
                ][k]
            )
            for k in range(2)
        ]

    slow_once = tunable([(1024, 4, 1), (2048, 8, 1)], *sizes({1024: (1.0, 16.0), 2048: (3.0, 3.0)}))
    found = tune_kernels.tune("interpreter", [slow_once], lambda work: work(), print)
    assert found[KEY].parameters == (2048, 8, 1)
    assert found[KEY].time == pytest.approx(3.0)
    assert found[KEY].time_before == pytest.approx(4.0)
    assert tune_kernels.tune("interpreter", [slow_once], lambda work: 1.0, print)[
        KEY
    ].parameters == (1024, 4, 1)
    assert "interpreter" not in tuned.TUNED


def test_a_candidate_that_cannot_run_is_left_out_and_said_so():
    def work():
        if launch.block_shape("adamw", torch.float32, torch.device("cpu")).block == 4096:
            raise RuntimeError("out of resources")
        return 1.0

    lines: list[str] = []
    found = tune_kernels.tune(
        "interpreter",
        [tunable([(4096, 1, 1), (1024, 4, 1)], lambda: work)],
        lambda work: work(),
        lines.append,
    )
    assert found[KEY].parameters == (1024, 4, 1)
    assert lines[0] == "adamw (4 bytes) (4096, 1, 1): left out: RuntimeError: out of resources"
    assert not tune_kernels.tune(
        "interpreter", [tunable([(4096, 1, 1)], lambda: work)], lambda work: work(), lines.append
    )
    assert "interpreter" not in tuned.TUNED


def test_a_table_keeps_what_it_held_for_other_parts(tmp_path, monkeypatch):
    monkeypatch.setitem(tuned.TUNED, "sm_80", {KEY: (512, 4)})
    monkeypatch.setitem(tuned.TUNED, "sm_90", {("rotary", 64, 2): (256,)})
    path = tmp_path / "tuned.py"
    tune_kernels.write_table(path, "sm_90", {KEY: (2048, 8)}, "a test")
    table = {}
    exec(path.read_text(), table)
    assert table["TUNED"] == {
        "sm_80": {KEY: (512, 4)},
        "sm_90": {KEY: (2048, 8), ("rotary", 64, 2): (256,)},
    }


@pytest.mark.slow
def test_a_dry_run_needs_no_gpu_and_writes_nothing():
    tool = ROOT / "tools" / "tune_kernels.py"
    answer = without_the_interpreter(
        tool, "--dry-run", "--only", "norm_backward", "--hidden", "4096"
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("a dry run for sm_90: 1 entries, ")
    assert answer.stdout.count("\n") == 1
    answer = without_the_interpreter(tool, "--dry-run", "--only", "norms")
    assert answer.returncode == 2
    assert "no such operation" in answer.stderr
    assert "Traceback" not in answer.stderr
