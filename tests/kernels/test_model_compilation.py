"""The machine code of the model's kernels, compiled here for GPUs that are not.

Whole vectors, no spills, the next row prefetched, and as many programs resident as the launch table counts on.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REGISTER_FILE = 65536  # 32-bit registers of a streaming multiprocessor, every NVIDIA architecture here
POINTWISE = ("add", "swiglu", "swiglu backward", "squared relu", "squared relu backward", "rotary", "rotary in place")
WIDTHS = (768, 1024, 2048, 4096, 8192)

FAST = [f"sm_90:{hidden}:bfloat16" for hidden in WIDTHS if hidden != 4096]
FAST += ["sm_90:4096:bfloat16:all:controls", "sm_80:4096:bfloat16", "sm_100:4096:bfloat16", "gfx942:4096:bfloat16"]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
SLOW = [
    [
        f"{architecture}:{hidden}:{dtype}{kind}"
        for hidden in (*WIDTHS, 5120, 12288, 16384)
        for dtype in ("bfloat16", "float32")
        for kind in ("", ":rms")
    ]
    for architecture in ARCHITECTURES
]


@pytest.fixture(scope="module")
def compiled(request):
    """{case: {kernel: what it uses}}, all from one process."""
    cases = request.param
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(HERE.parents[1])}
    program = [sys.executable, str(HERE / "compile_model_kernels.py"), *cases]
    answer = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def check_case(case, kernels):
    architecture, hidden, *_ = case.split(":")
    nvidia = architecture.startswith("sm_")
    for name, used in kernels.items():
        if "without" in name or "unaligned" in name:
            continue  # the negative controls
        where = f"{case} {name}: {used}"
        assert used["spills"] == 0, where
        assert used["loads_128_bit"] > 0 or not nvidia, where
        if nvidia and name in POINTWISE:
            assert used["loads_128_bit"] == used["loads"], where
        if nvidia and name in ("norm", "forward") and int(hidden) in (1024, 2048, 4096, 8192):
            assert used["loads_128_bit"] == used["loads"], where
    backward = kernels["backward"]
    registers = backward["registers"] * backward["threads"]
    if nvidia:
        resident = backward["programs_per_processor"] if int(hidden) <= 8192 else 1
        assert registers * resident <= REGISTER_FILE, f"{case}: {resident} programs of {registers} registers do not fit"
        assert backward["prefetches"] > 0 or int(hidden) > 8192, case
    else:
        assert backward["registers"] <= 128, case


@pytest.mark.parametrize("compiled", [FAST], indirect=True, ids=["bfloat16"])
def test_kernels_spill_nothing_load_whole_vectors_prefetch_and_fit(compiled):
    for case, kernels in compiled.items():
        check_case(case, kernels)


@pytest.mark.parametrize("compiled", [FAST], indirect=True, ids=["bfloat16"])
def test_machine_code_shows_what_was_left_out(compiled):
    """Negative controls: the properties above come from the stages, the register cap and the alignment."""
    kernels = compiled["sm_90:4096:bfloat16:all:controls"]
    assert kernels["backward"]["prefetches"] > 0 and kernels["backward without stages"]["prefetches"] == 0
    assert kernels["backward"]["registers"] <= 128 < kernels["backward without register cap"]["registers"]
    assert kernels["swiglu of unaligned rows"]["loads_128_bit"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("compiled", SLOW, indirect=True, ids=ARCHITECTURES)
def test_kernels_of_every_architecture_spill_nothing_and_fit(compiled):
    for case, kernels in compiled.items():
        check_case(case, kernels)
