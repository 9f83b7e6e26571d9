"""The benchmark's cases and the tuner, at small sizes on the CPU: every callable runs and every kernel is right."""

import ast
from functools import partial

import pytest
import torch

from megatron_completep.analysis import tune_kernels
from megatron_completep.analysis.step_kernel_cases import KernelCase, step_kernel_cases
from megatron_completep.kernels import launch, tuned

TOLERANCES = {"adamw": 1e-2, "gradient norm": 1e-6}  # AdamW's travels 1e-4 from 1, where float32 has steps of 1e-7
SMALL = {"parameters": (5000,), "logits": ((32, 500),)}


def test_every_case_runs_and_is_right():
    seen = {}
    for case in step_kernel_cases("cpu", **SMALL):
        assert case.error() < TOLERANCES.get(case.kernel, 5e-3), case.kernel
        case.run()
        for baseline in case.baselines.values():
            baseline()
        seen[case.kernel] = case.floor_bytes
    assert seen["adamw"] == 30 * 5000 and seen["gradient norm"] == 4 * 5000
    assert seen["cross-entropy forward + backward"] == 6 * 32 * 500
    assert set(tune_kernels.CANDIDATES) <= set(seen)


def test_the_tuner_keeps_the_fastest_shape_and_restores_the_table():
    """A clock that prefers one shape of each operation, and reads it from what a launcher would launch with."""
    wanted = {"adamw": (2048, 8), "sum_of_squares": (1024, 8), "cross_entropy_forward": (8192, 4), "cross_entropy_backward": (1024, 4)}

    def cases(device):
        for kernel, (operation, _) in tune_kernels.CANDIDATES.items():
            run = partial(lambda operation: (operation, launch.block_shape(operation, device)), operation)
            yield KernelCase(kernel, "any size", 1, run, {}, lambda: 0.0)

    def clock(run):
        operation, shape = run()
        return 1.0 if shape == wanted[operation] else 2.0

    before = {architecture: dict(table) for architecture, table in tuned.TUNED.items()}
    assert tune_kernels.tune(torch.device("cpu"), cases, clock, lambda line: None) == wanted
    assert {k: v for k, v in tuned.TUNED.items() if v} == before


def test_a_written_table_can_be_read_again(tmp_path):
    path = tmp_path / "tuned.py"
    tune_kernels.write_table(path, "sm_90", {"adamw": (2048, 8)}, "a test")
    tree = ast.parse(path.read_text())
    table = ast.literal_eval(tree.body[-1].value)
    assert table["sm_90"] == {"adamw": (2048, 8)}


@pytest.mark.parametrize("operation", ["adamw", "sum_of_squares", "cross_entropy_forward", "cross_entropy_backward"])
def test_a_tuned_shape_is_what_is_launched(operation):
    with tune_kernels.launch_shape("interpreter", operation, (128, 1)):
        assert launch.block_shape(operation, torch.device("cpu")) == (128, 1)
    assert launch.block_shape(operation, torch.device("cpu")) != (128, 1)
