"""By the profiler: what runs between the products when their definitions are compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_completep.kernels import CompiledDefinitions
from megatron_completep.model.gpt import GPT
from megatron_completep.model.initialize import initialize
from megatron_completep.parallel.context import ParallelContext
from tests.support.models import (
    batch_of,
    build_optimizer,
    model_config,
    optimizer_config,
    table_for,
)

COMPILED = "a compiled definition"
MODELS = {
    "swiglu": {"norm": "rmsnorm", "activation": "swiglu", "position": "rope"},
    "gelu": {"norm": "layernorm", "activation": "gelu", "position": "learned", "bias": True},
}
# Compiled definitions that a layer calls, forward and backward: of two norms, of the activation and
# of the rotation. LayerNorm's backward, and in float32 SwiGLU's forward, stay operators.
DEFINITIONS = {
    ("swiglu", torch.bfloat16): 8,
    ("swiglu", torch.float32): 7,
    ("gelu", torch.bfloat16): 2,
    ("gelu", torch.float32): 2,
}
# What a layer calls then, at most, of the operators and definitions that it calls uncompiled.
SHARE = {
    ("swiglu", torch.bfloat16): 0.55,
    ("swiglu", torch.float32): 0.5,
    ("gelu", torch.bfloat16): 0.9,
    ("gelu", torch.float32): 0.9,
}


def as_one_event(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A backend that compiles nothing, and shows a whole graph as one event of the profiler."""

    def run(*arguments: Any) -> Any:
        with record_function(COMPILED):
            return graph(*arguments)

    return run


def operators_of_passes(kind: str, layers: int, dtype: torch.dtype, compiled: bool) -> Counter[str]:
    """How often each operator ran in one forward and backward pass.

    Those that another operator or a compiled definition calls do not count.
    """
    torch._dynamo.reset()
    config = model_config(num_layers=layers, **MODELS[kind])
    table = table_for(config)
    definitions = CompiledDefinitions(as_one_event) if compiled else None
    gpt = GPT(config, table, ParallelContext.single(), compiled=definitions)
    gpt.layer_graphs = None  # the operations alone, not the graphs of whole layers
    initialize(gpt, table, optimizer_config(), 1)
    optimizer = build_optimizer(gpt, table, precision=dtype)
    tokens, labels = batch_of(config)

    def passes() -> None:
        optimizer.begin_step(1)
        optimizer.wait_for_parameters()
        gpt(tokens, labels=labels).backward()

    passes()  # compiles
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        passes()
    counts: Counter[str] = Counter()
    for event in trace.events():
        is_operator = event.name.startswith((COMPILED, "aten::", "completep::"))
        if is_operator and not called_by_another(event):
            counts[event.name] += 1
    return counts


def called_by_another(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        # The project's own operators are Python around torch's, which are what a step pays for.
        if parent.name == COMPILED or parent.name.startswith("aten::"):
            return True
        parent = parent.cpu_parent
    return False


def of_a_layer(kind: str, dtype: torch.dtype, compiled: bool) -> Counter[str]:
    """The operators that another layer adds to both passes."""
    deep = operators_of_passes(kind, 3, dtype, compiled)
    deep.subtract(operators_of_passes(kind, 2, dtype, compiled))
    return deep


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("kind", MODELS)
def test_a_layer_calls_each_compiled_definition_once_and_fewer_operators(kind, dtype):
    operators = of_a_layer(kind, dtype, compiled=False)
    with_definitions = of_a_layer(kind, dtype, compiled=True)
    assert with_definitions[COMPILED] == DEFINITIONS[kind, dtype]
    assert operators[COMPILED] == 0  # the control: nothing is compiled unasked
    assert with_definitions.total() <= SHARE[kind, dtype] * operators.total()
