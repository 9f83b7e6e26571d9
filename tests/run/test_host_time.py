"""What the host does for one layer in one training step: operators and calls of Python functions.

A small model's step takes mostly this, and no kernel shows it. It is counted and not timed: the
counts of two depths, subtracted, are those of a layer, its update included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from megatron_completep.benchmarks.training_benchmark import (
    KINDS,
    BenchmarkSettings,
    random_batch,
    run_config,
)
from megatron_completep.completep import table_of
from megatron_completep.kernels import CompiledDefinitions
from megatron_completep.model import layer_graph
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.products import Products
from megatron_completep.run.assemble import assemble, build_model
from tests.support.models import model_config

LAYERS = 2
# Of one layer: operators of torch with those inside of them, and Python calls. They may fall.
# A change that raises one says why; other versions of torch and Python need a little more.
MOST_OPERATORS = {"gelu": 623, "swiglu": 599}
MOST_CALLS = {"gelu": 427, "swiglu": 398}
SLACK = 1.03
# Calls of a layer in graphs of two, under training.compile, its update included.
MOST_CALLS_IN_GRAPHS = {"gelu": 260, "swiglu": 195}

Step = Callable[[], Any]


def step_of(kind: str, layers: int, **changes: Any) -> Step:
    """One step of `pretrain` in float32, after one that fills the caches."""
    options: Mapping[str, Any] = {**KINDS[kind], **changes, "num_layers": layers}
    settings = BenchmarkSettings(model_config(**options), batch_size=2)
    config = run_config(settings, "float32")
    step = assemble(config, ParallelContext.single()).step
    batch = random_batch(settings)
    step.run([batch], 1)
    return lambda: step.run([batch], 2)


def step_of_graphs(kind: str, layers: int) -> Step:
    """The same with whole layers as graphs; calls inside of a graph are the compiler's."""
    settings = BenchmarkSettings(model_config(**KINDS[kind], num_layers=layers), batch_size=2)
    config = run_config(settings, "float32")
    context = ParallelContext.single()
    table = table_of(config)
    compiled = CompiledDefinitions(aot_autograd(fw_compiler=uncounted))
    chunks = build_model(config, table, context, torch.float32, Products(), compiled)
    step = assemble(config, context, table, chunks).step
    batch = random_batch(settings)
    step.run([batch], 1)
    return lambda: step.run([batch], 2)


def uncounted(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
    """A compiler that compiles nothing, and whose graphs' own calls are not counted."""

    def run(*arguments: Any) -> Any:
        profile = sys.getprofile()
        sys.setprofile(None)
        try:
            return graph(*arguments)
        finally:
            sys.setprofile(profile)

    return make_boxed_func(run)


def operators(step: Step) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    return sum(event.count for event in profiler.key_averages() if "::" in event.key)


def python_calls(step: Step) -> int:
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls


def of_a_layer(counted: Callable[[Step], int], kind: str, **changes: Any) -> float:
    deep = counted(step_of(kind, 2 * LAYERS, **changes))
    return (deep - counted(step_of(kind, LAYERS, **changes))) / LAYERS


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_layer_takes_no_more_operators_and_calls_than_before(kind: str) -> None:
    assert of_a_layer(operators, kind) <= SLACK * MOST_OPERATORS[kind]
    assert of_a_layer(python_calls, kind) <= SLACK * MOST_CALLS[kind]


@pytest.mark.parametrize("kind", ["swiglu", pytest.param("gelu", marks=pytest.mark.slow)])
def test_a_layer_of_a_graph_takes_a_fraction_of_the_calls(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_graph, "LAYERS_A_GRAPH", LAYERS)
    torch._dynamo.reset()
    # Between the depths lies one graph more, which is like those before it.
    three, two = (python_calls(step_of_graphs(kind, number * LAYERS)) for number in (3, 2))
    assert (three - two) / LAYERS <= SLACK * MOST_CALLS_IN_GRAPHS[kind]


def test_an_operation_more_in_a_layer_is_noticed() -> None:
    """QK-norm adds two norms to a layer."""
    more = {"qk_norm": True}
    assert of_a_layer(operators, "swiglu", **more) > SLACK * MOST_OPERATORS["swiglu"]
    assert of_a_layer(python_calls, "swiglu", **more) > SLACK * MOST_CALLS["swiglu"]
