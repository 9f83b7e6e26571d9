"""The machine code of the optimizer and loss kernels, compiled here for GPUs that are not:
whole vectors, few registers, no spills.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# 64 registers leave 1024 threads to a multiprocessor of NVIDIA, 128 leave 16 wavefronts to a
# compute unit of AMD.
REGISTERS = {"sm": 64, "gf": 128}
VECTOR_LOADS = {
    "adamw": 4,
    "adamw float32": 4,
    "sum_of_squares": 2,
    "cross_entropy_forward": 2,
    "cross_entropy_backward": 2,
    "begin_step": 0,
}


@pytest.mark.parametrize(
    "architecture",
    [
        "sm_90",
        pytest.param("sm_80", marks=pytest.mark.slow),
        pytest.param("sm_100", marks=pytest.mark.slow),
        "gfx942",
    ],
)
def test_kernels_load_whole_vectors_and_spill_nothing(architecture):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(HERE.parents[1])}
    program = [sys.executable, str(HERE / "compile_step_kernels.py"), architecture]
    answer = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)[architecture]
    for name, loads in VECTOR_LOADS.items():
        assert found[name]["spills"] == 0, name
        assert found[name]["registers"] <= REGISTERS[architecture[:2]], name
        assert found[name]["loads_128_bit"] >= loads, name
    assert found["adamw without its hint"]["loads_128_bit"] == 0
    if architecture.startswith("sm_"):
        assert (
            found["cross_entropy_forward"]["prefetches"]
            > 0
            == found["cross_entropy_backward"]["prefetches"]
        )
