"""The tuner of launch shapes, with a clock of our own: it needs no GPU to show that it keeps the fastest."""

import ast
from functools import partial

import pytest
import torch

from megatron_completep.analysis import tune_kernels
from megatron_completep.analysis.kernel_cases import Case, cross_entropy_cases, optimizer_cases
from megatron_completep.kernels import launch, tuned


def test_the_benchmark_has_a_case_for_everything_that_is_tuned():
    cpu = torch.device("cpu")
    cases = [*optimizer_cases(4096, cpu), *cross_entropy_cases(8, 128, torch.bfloat16, cpu, with_compile=False)]
    assert set(tune_kernels.CANDIDATES) <= {case.kernel for case in cases}
    assert {operation for operation, _ in tune_kernels.CANDIDATES.values()} == set(launch._BLOCK_SHAPES)


def test_the_tuner_keeps_the_fastest_shape_and_restores_the_table():
    """A clock that prefers one shape of each operation, and reads it from what a launcher would launch with."""
    wanted = {"adamw": (2048, 8), "sum_of_squares": (1024, 8), "cross_entropy_forward": (8192, 4), "cross_entropy_backward": (1024, 4)}

    def cases(device):
        for kernel, (operation, _) in tune_kernels.CANDIDATES.items():
            run = partial(lambda operation: (operation, launch.block_shape(operation, device)), operation)
            yield Case(kernel, 1, 1, 1, {"ours": run})

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
