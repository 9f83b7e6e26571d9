"""The machine code of the model's kernels, compiled here for GPUs that are not.

Whole vectors, no spills, the next row prefetched, and as many programs resident as the launch table
counts on.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

HERE = Path(__file__).parent
WIDTHS = (768, 1024, 2048, 4096, 8192)
OLDER = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
# Instructions: stored once, loaded once. What triton 3.6 leaves in the backward with dropout, on
# sm_90.
ONE_REGISTER = 2
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
WHOLE = (
    "norm",
    "forward",
    "add",
    "swiglu",
    "swiglu backward",
    "squared relu",
    "squared relu backward",
    "rotary",
    "rotary in place",
    "join heads",
    "head norm",
)

# The narrowest and the widest on one architecture (4096 with the kernels beside the norm, and with
# the negative controls), one width on the others. All of them in the slow suite.
CONTROLLED = "sm_90:4096:bfloat16:dropout:controls"
FAST = ["sm_90:768:bfloat16:dropout", "sm_90:8192:bfloat16:dropout"]
FAST += [CONTROLLED, "sm_90:768:bfloat16", "sm_90:4096:bfloat16:all"]
FAST += ["sm_80:4096:bfloat16", "sm_100:768:bfloat16", "gfx942:4096:bfloat16"]
SLOW = [
    [
        f"{architecture}:{hidden}:{dtype}{kind}"
        for hidden in (*WIDTHS, 384, 640, 5120, 12288, 16384)
        for dtype, kind in itertools.product(
            ("bfloat16", "float32"), ("", ":rms", ":dropout", ":dropout:rms")
        )
        if dtype == "bfloat16" or kind in ("", ":dropout:rms")
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


def resident(architecture, used):
    """Programs that the registers of one processor hold:
    65536 of a multiprocessor, 512 a lane in four units of AMD's.
    """
    if architecture.startswith("sm_"):
        return 65536 // (used["registers"] * used["threads"])
    return 4 * (512 // used["registers"]) * 64 // used["threads"]


def ceiling(architecture, hidden, kernel, dropout):
    """Registers a thread: half a multiprocessor's threads in the backward,
    fewer and wider ones where a warp has a row (768), and where two warps have a tile of heads.
    """
    if kernel == "head norm backward":
        return 256
    if kernel != "backward":
        return 128
    if architecture.startswith("gfx"):
        return 320 if dropout else 256  # of 512
    return 256 if hidden == 768 else 128


def narrow_loads(used, rms, dropout):
    """At most so many loads of less than 128 bits:
    the rows' statistics and what the dropout reads, in each copy of the loop.
    """
    return used["copies"] * ((2 - rms) * used["rows"] + dropout * numbers_of_dropout(used))


def numbers_of_dropout(used):
    """The six numbers of the seed that say which rows these are, and the key for each segment."""
    return 6 + used["segments"]


def check_case(case, kernels):
    architecture, hidden, _, *kind = case.split(":")
    hidden, rms, dropout = int(hidden), "rms" in kind, "dropout" in kind
    for name, used in kernels.items():
        if "without" in name or "unaligned" in name:
            continue  # the negative controls
        where = f"{case} {name}: {used}"
        assert used["spills"] <= (
            ONE_REGISTER if OLDER and dropout and name == "backward" else 0
        ), where
        if hidden not in WIDTHS:
            continue
        assert used["registers"] <= ceiling(architecture, hidden, name, dropout), where
        narrow = used["loads"] - used["loads_128_bit"]
        if name in WHOLE:
            assert narrow <= dropout * numbers_of_dropout(used) and used["loads_128_bit"] > 0, where
        if name == "head norm backward":
            # Narrow: of a tile the inverse deviations of queries and of keys, and a row of angles,
            # which few threads hold.
            assert narrow <= (2 + 4) * used["copies"] and used["loads_128_bit"] > 0, where
            assert used["programs_per_processor"] <= resident(architecture, used), where
            assert used["prefetches"] > 0 or not architecture.startswith("sm_"), where
        if name.startswith("float8"):
            # Narrow: the scale's magnitude, or the row of the table of segments.
            narrow_at_most = {"float8 largest": 0, "float8 of segments": 3}.get(name, 1)
            assert narrow <= narrow_at_most and used["loads_128_bit"] > 0, where
        if name == "reduce":
            # The main gradients may be narrow: a tile has fewer columns than a program threads.
            assert narrow <= 3 and used["loads_128_bit"] > 0, where
        if name in ("backward", "add backward"):
            assert narrow <= narrow_loads(used, rms, dropout), where
            assert used["loads_128_bit"] > 0 and used["programs_per_processor"] <= resident(
                architecture, used
            ), where
            assert used["prefetches"] > 0 or not architecture.startswith("sm_"), where


@pytest.mark.parametrize("compiled", [FAST], indirect=True, ids=["bfloat16"])
def test_kernels_spill_nothing_load_whole_vectors_prefetch_and_fit(compiled):
    for case, kernels in compiled.items():
        check_case(case, kernels)


@pytest.mark.parametrize("compiled", [FAST], indirect=True, ids=["bfloat16"])
def test_machine_code_shows_what_was_left_out(compiled):
    """Negative controls: the properties above come from the stages, the register cap and the
    alignment.
    """
    kernels = compiled[CONTROLLED]
    assert kernels["backward"]["prefetches"] > 0
    assert kernels["backward without stages"]["prefetches"] == 0
    assert kernels["backward without register cap"]["registers"] > 128
    assert kernels["swiglu of unaligned rows"]["loads_128_bit"] == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("compiled", SLOW, indirect=True, ids=ARCHITECTURES)
def test_kernels_of_every_architecture_spill_nothing_and_fit(compiled):
    for case, kernels in compiled.items():
        check_case(case, kernels)


def test_a_launch_finds_what_was_compiled_ahead_of_time(tmp_path):
    """Triton's own launch path, up to the driver;
    and a launch with other parameters is seen to compile.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(HERE.parents[1])}
    program = [sys.executable, str(HERE / "launch_after_compiling.py"), "sm_90", str(tmp_path)]
    answer = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    counts = json.loads(answer.stdout)
    assert counts["compiled ahead"] == counts["launches"] == counts["after launching"] == 3
    assert counts["after a launch that was not foreseen"] == 4
