"""Compiling a run's kernels before it starts, by the tool as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from megatron_completep.tools.compile_kernels import main
from tests.support.commands import Programs

ROOT = Path(__file__).parents[2]
CONFIG = [
    str(ROOT / "configs" / "quickstart.yaml"),
    "training.precision=bf16",
    "model.num_layers=2",
    "training.float8=tensorwise",
    "training.float8_least_size=16",
]
OPTIMIZER_AND_LOSS = {
    "adamw_kernel",
    "sum_of_squares_kernel",
    "begin_step_kernel",
    "cross_entropy_forward_kernel",
    "cross_entropy_backward_kernel",
}


def compile_kernels(*arguments):
    """A process of its own: one that has chosen Triton's interpreter cannot compile."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, str(ROOT / "tools" / "compile_kernels.py"), *arguments]
    return subprocess.run(
        program, env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_every_kernel_of_a_run_is_compiled_into_the_cache(tmp_path):
    answer = compile_kernels(*CONFIG, "--arch", "sm_90", "--cache-dir", str(tmp_path), "--json")
    assert answer.returncode == 0, answer.stderr
    summary = json.loads(answer.stdout)
    kernels = {line.split()[0] for line in answer.stderr.splitlines() if "  grid " in line}
    names = {kernel.partition(".")[2] for kernel in kernels}
    modules = {kernel.partition(".")[0] for kernel in kernels}
    assert names >= OPTIMIZER_AND_LOSS
    assert modules >= {"residual_norm", "rotary", "swiglu", "float8"}
    assert len(list(tmp_path.rglob("*.cubin"))) == summary["kernels"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [CONFIG[0], "training.precision=float64", "--arch", "sm_90"],
            "training.precision = float64",
        ),
        ([*CONFIG, "--arch", "sm_80"], "needs float8 units, which sm_80 has not"),
        (["no_such_file.yaml", "--arch", "sm_90"], "no_such_file.yaml"),
    ],
)
def test_a_run_that_launches_nothing_is_refused(
    arguments, message, programs: Programs, monkeypatch: pytest.MonkeyPatch
):
    # Refused before anything is compiled, which this process could not do.
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    ended = programs.run(main, *arguments)
    assert ended.code == 2
    assert message in ended.err and "Traceback" not in ended.err
