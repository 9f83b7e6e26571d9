"""Compiled definitions between the products change no number, in any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._inductor

from megatron_completep.errors import ConfigError
from megatron_completep.model.compile import compiled_definitions
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.precision import DTYPES
from megatron_completep.training.build import describe_run
from tests.parallel.compiling import train_twice
from tests.parallel.counting import build_step, run_config

GELU = {
    "norm": "layernorm",
    "activation": "gelu",
    "position": "alibi",
    "bias": True,
    "tied_embeddings": True,
}
SEQUENCE = {"tensor_parallel_size": 2, "sequence_parallel": True}
RUNS = {
    "one process's layout": (1, {}),
    "selective recomputation": (1, {"training": {"recompute": "selective"}, "model": GELU}),
    "full recomputation, grouped queries": (
        1,
        {"training": {"recompute": "full"}, "model": {"num_query_groups": 2}},
    ),
    "tensor 2": (2, {"parallel": {"tensor_parallel_size": 2}}),
    "tensor 2 with sequence": (2, {"parallel": SEQUENCE, "model": GELU}),
    "pipeline 2, zero-bubble": (
        2,
        {
            "parallel": {"pipeline_parallel_size": 2, "schedule": "zero_bubble"},
            "model": {"activation": "gelu"},
        },
    ),
    "pipeline 2, empty last stage": (
        2,
        {"parallel": {"pipeline_parallel_size": 2, "pipeline_split": [4, 0]}},
    ),
    "experts on 2 ranks, selective recomputation": (
        2,
        {
            "parallel": {"expert_parallel_size": 2},
            "model": {"moe": {"num_experts": 4, "top_k": 2, "shared_ffn_hidden_size": 16}},
            "training": {"recompute": "selective"},
        },
    ),
    "data 2": (2, {"model": {"activation": "squared_relu"}}),
}


def compare(pool, name: str, backend: str, tolerance: float) -> None:
    processes, sections = RUNS[name]
    # The key biases' gradient is rounding noise, which Adam would amplify.
    sections = {**sections, "optimizer": {"base_eps": 1e-3}}
    graphs = 0
    for (losses, parameters), (compiled_losses, compiled), count in pool.run(
        processes, train_twice, sections, backend
    ):
        assert compiled_losses == pytest.approx(losses, rel=tolerance)
        for key, value in parameters.items():
            assert (compiled[key] - value).norm() <= tolerance * value.norm().clamp_min(1e-3), key
        graphs += count
    assert graphs >= 2  # at least the first norm and the others were really compiled


LESS_OFTEN = (
    "data 2",
    "tensor 2",
    "pipeline 2, empty last stage",
    "full recomputation, grouped queries",
    "experts on 2 ranks, selective recomputation",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in LESS_OFTEN else ()) for name in RUNS],
)
def test_traced_definitions_give_equal_losses_and_parameters(pool, name):
    """aot_eager traces forward and backward and runs the same kernels:
    equal but for the order of a few additions.
    """
    compare(pool, name, "aot_eager", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["one process's layout", "tensor 2 with sequence", "pipeline 2, zero-bubble"]
)
def test_inductor_gives_equal_losses_and_parameters(pool, name):
    compare(pool, name, "inductor", 1e-4)


def definitions_of_layers(rank: int, sections: dict[str, Any]) -> list[bool]:
    """Whether each norm before a branch was handed compiled definitions."""
    step, _, _ = build_step(rank, run_config(sections))
    blocks = [block for chunk in step.forward_backward.chunks for _, block in chunk.blocks()]
    return [norm.compiled is not None for block in blocks for norm, _ in block.branches]


@pytest.mark.parametrize("compile_them", [True, False])
def test_the_setting_decides_whether_definitions_are_compiled(pool, compile_them):
    sections = {"training": {"compile": compile_them}}
    assert pool.run(1, definitions_of_layers, sections) == [[compile_them] * 8]


def test_float64_and_gpus_keep_their_operators():
    cpu = torch.device("cpu")
    assert compiled_definitions(True, cpu, torch.bfloat16) is not None  # the control
    assert compiled_definitions(True, cpu, torch.float64) is None
    assert compiled_definitions(True, torch.device("cuda"), torch.bfloat16) is None
    assert compiled_definitions(False, cpu, torch.float32) is None


@pytest.mark.parametrize(
    ("compile_them", "precision", "warned"),
    [(True, "float64", True), (True, "float32", False), (False, "float64", False)],
)
def test_a_run_in_which_the_setting_changes_nothing_says_so(compile_them, precision, warned):
    config = run_config({"training": {"compile": compile_them, "precision": precision}})
    dtype = DTYPES[precision]
    lines = describe_run(config, ParallelContext.single(), dtype, 1, [], "torch")
    assert ("training.compile = true changes nothing: float64" in lines) == warned


def test_a_machine_without_a_compiler_is_told_what_to_do():
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigError, match=r"training\.compile = true needs a C\+\+ compiler.*CXX"),
    ):
        compiled_definitions(True, torch.device("cpu"), torch.float32)


def test_a_compiler_that_computes_something_else_is_caught(pool):
    """Negative control: a backend that scales what it compiles."""
    with pytest.raises(AssertionError):
        compare(pool, "one process's layout", wrong_backend, 1e-5)  # type: ignore[arg-type]


def wrong_backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
    return lambda *arguments: [x * 1.01 for x in graph(*arguments)]
