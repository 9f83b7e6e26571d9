"""Layers as compiled graphs: equal to the blocks, where they serve, and when they are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_completep.benchmarks.training_benchmark import BenchmarkSettings, random_batch
from megatron_completep.completep import table_of
from megatron_completep.instruments.trial import change
from megatron_completep.kernels import CompiledDefinitions, reference
from megatron_completep.model import layer_graph
from megatron_completep.model.layer_graph import LayerRun
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.gradients import main_grad_of
from megatron_completep.parallel.onednn import LeastWork, find_linear
from megatron_completep.parallel.products import OneDnnProducts, Products
from megatron_completep.parallel.traced import TracedProducts
from megatron_completep.run.assemble import assemble, build_model
from megatron_completep.run.step import TrainingStep
from megatron_completep.training.build import _compiled
from tests.support.configs import GPT2, small_config

Backend = str | Callable[..., Any]

LAYERS_A_GRAPH = 2  # here: tracing takes its time
LAYERS = 3  # a graph of one layer, and one of two
MODELS: dict[str, dict[str, Any]] = {
    "gelu": GPT2,
    "swiglu, grouped queries": {"num_query_groups": 2},
    "squared ReLU, QK-norm, tied": {
        "activation": "squared_relu",
        "qk_norm": True,
        "tied_embeddings": True,
    },
}


def step_of(
    backend: Backend | None,
    products: Products | None = None,
    precision: str = "float32",
    training: dict[str, Any] | None = None,
    **model: Any,
) -> TrainingStep:
    """Its steps have four micro-batches; backend None: as without training.compile.

    A larger epsilon, as the gradients of key biases are rounding noise, which Adam would amplify.
    """
    torch._dynamo.reset()
    sections = {
        "model": {"num_layers": LAYERS, **model},
        "training": {"precision": precision, **(training or {})},
    }
    config = small_config(optimizer={"base_eps": 1e-3}, **sections)
    context = ParallelContext.single()
    table = table_of(config)
    chunks = None
    if backend is not None:
        definitions = CompiledDefinitions(backend)
        chunks = build_model(
            config, table, context, torch.float32, products or Products(), definitions
        )
    return assemble(config, context, table, chunks).step


def train(step: TrainingStep, steps: int = 3) -> list[float]:
    """The losses of some steps of four micro-batches."""
    training = step.config.training
    batch = random_batch(BenchmarkSettings(step.config.model, training.micro_batch_size))
    batches = [batch] * (training.global_batch_size // training.micro_batch_size)
    return [step.run(batches, number).read().loss for number in range(1, steps + 1)]


def compare(with_graphs: TrainingStep, blocks: TrainingStep, tolerance: float) -> None:
    """The same losses and the same parameters after some steps."""
    assert train(with_graphs) == pytest.approx(train(blocks), rel=tolerance)
    expected = blocks.optimizer.shards.parameters
    for name, parameter in with_graphs.optimizer.shards.parameters.items():
        difference = (parameter - expected[name]).norm()
        assert difference <= tolerance * expected[name].norm().clamp_min(1e-3), name


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of layers of the graphs that are called."""
    monkeypatch.setattr(layer_graph, "LAYERS_A_GRAPH", LAYERS_A_GRAPH)
    called: list[int] = []
    call = LayerRun.__call__

    def counted(run: LayerRun, *arguments: Any) -> Any:
        called.append(len(run.weights))
        return call(run, *arguments)

    monkeypatch.setattr(LayerRun, "__call__", counted)
    return called


# The other two have all that this one has, but for its activation.
PLAIN = "swiglu, grouped queries"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == PLAIN else ()) for name in MODELS],
)
def test_graphs_give_the_losses_and_parameters_of_the_blocks(name: str, runs: list[int]) -> None:
    compare(step_of("aot_eager", **MODELS[name]), step_of(None, **MODELS[name]), 1e-5)
    assert runs == [1, LAYERS_A_GRAPH] * 4 * 3  # micro-batches, steps


def gradients_of(step: TrainingStep) -> dict[str, Tensor]:
    """The main gradients of a step of one micro-batch, by the parameters' names."""
    step.run([random_batch(BenchmarkSettings(step.config.model, 2))], 1)
    (chunk,) = step.chunks
    return {name: main_grad_of(parameter) for name, parameter in chunk.named_parameters()}


BF16_MODELS: dict[str, dict[str, Any]] = {
    "gelu": GPT2,
    "squared ReLU, QK-norm, tied, grouped queries": {
        **MODELS["squared ReLU, QK-norm, tied"],
        "num_query_groups": 2,
    },
}


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        ("gelu", "float32"),
        (list(BF16_MODELS)[1], "bf16"),
        pytest.param("gelu", "bf16", marks=pytest.mark.slow),
        pytest.param(list(BF16_MODELS)[1], "float32", marks=pytest.mark.slow),
    ],
)
def test_bf16_graphs_give_the_gradients_of_the_blocks(
    name: str, stream: str, runs: list[int]
) -> None:
    """Each is as near to those of float32 as the blocks' own, which round in other places."""
    model = BF16_MODELS[name]
    one: dict[str, Any] = {"training": {"micro_batch_size": 2, "global_batch_size": 2}}
    bf16 = {"precision": "bf16", "fp32_residual": stream == "float32", **one, **model}
    by_graphs = gradients_of(step_of("aot_eager", **bf16))
    assert runs == [1, LAYERS_A_GRAPH]
    by_blocks = gradients_of(step_of(None, **bf16))
    exact = gradients_of(step_of(None, **one, **model))
    for parameter, gradient in by_graphs.items():
        size = exact[parameter].norm().clamp_min(1e-4)
        error = (gradient - exact[parameter]).norm() / size
        native = (by_blocks[parameter] - exact[parameter]).norm() / size
        assert error <= 1.5 * native + 2e-3, parameter


def test_bf16_gradients_of_vectors_are_not_rounded(runs: list[int]) -> None:
    one = {"micro_batch_size": 2, "global_batch_size": 2}
    gradients = gradients_of(step_of("aot_eager", precision="bf16", training=one, **GPT2))
    assert runs

    def share_that_bf16_holds(part: str) -> float:
        chosen = [gradient for name, gradient in gradients.items() if part in name]
        assert chosen, part
        values = torch.cat([gradient.flatten() for gradient in chosen])
        return float((values == values.bfloat16().float()).float().mean())

    for vector in ("attention_norm.weight", "mlp_norm.bias", "qkv.bias", "up.bias", "down.bias"):
        assert share_that_bf16_holds(vector) < 0.5, vector
    # The control: of one micro-batch the gradients of matrices are products in bf16.
    assert share_that_bf16_holds("up.weight") == 1.0


def test_a_graph_that_computes_something_else_is_noticed() -> None:
    """Negative control: a backend that scales what it compiles."""

    def wrong(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        return lambda *arguments: [x * 1.01 for x in graph(*arguments)]

    with pytest.raises(AssertionError):
        compare(step_of(wrong), step_of(None), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_inductor_gives_the_losses_and_parameters_of_the_blocks(name: str, runs: list[int]) -> None:
    compare(step_of("inductor", **MODELS[name]), step_of(None, **MODELS[name]), 1e-4)
    assert runs


def test_a_parameter_that_is_not_trained_stays_as_it_is(runs: list[int]) -> None:
    step = step_of("eager")
    block = step.chunks[0].blocks()[1][1]
    frozen = block.mlp.up.weight
    frozen.requires_grad_(False)
    train(step, 1)
    assert runs
    assert not main_grad_of(frozen).any()
    assert main_grad_of(block.mlp.down.weight).any()  # the control


@pytest.mark.parametrize(
    "trained", ["layers.2.mlp.down", "layers.2.mlp", "layers.0", "unembedding"]
)
def test_where_little_is_trained_its_gradients_are_those_of_the_blocks(
    trained: str, runs: list[int]
) -> None:
    gradients = []
    for backend in ("eager", None):
        step = step_of(backend)
        (chunk,) = step.chunks
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        found = gradients_of(step)
        gradients.append({name: found[name] for name in found if name.startswith(trained)})
    assert runs == [1, LAYERS_A_GRAPH]
    assert gradients[0]
    for name, gradient in gradients[0].items():
        assert gradient.any()
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_the_loss_of_a_compiled_run_is_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("cross_entropy_forward", "cross_entropy_backward_"):
        definition = getattr(reference, name)

        def counted(*arguments: Any, definition: Any = definition, name: str = name) -> Any:
            calls.append(name)
            return definition(*arguments)

        monkeypatch.setattr(f"megatron_completep.kernels.cpu.compiled._{name}", counted)
    one: dict[str, Any] = {"training": {"micro_batch_size": 2, "global_batch_size": 2}}
    gradients_of(step_of("eager", **one))
    assert calls == ["cross_entropy_forward", "cross_entropy_backward_"]
    gradients_of(step_of(None, **one))
    assert len(calls) == 2  # the control


def test_in_graphs_onednn_begins_at_four_times_the_work() -> None:
    products = OneDnnProducts(torch.nn.functional.linear, LeastWork(1 << 23, None))  # type: ignore[arg-type]
    assert products.traced() == TracedProducts(LeastWork(1 << 25, None))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "layers, 4 a graph"),
        ({"precision": "bf16"}, "layers, 4 a graph"),
        ({"precision": "bf16", "fp32_residual": True}, "layers, 4 a graph"),
        ({"data": {"reset_at_document_ends": True}}, "data.reset_at_document_ends"),
        ({"dropout": 0.1}, "dropout"),
        ({"training": {"recompute": "selective"}}, "recompute: selective"),
    ],
    ids=str,
)
def test_the_start_up_line_says_what_is_compiled(settings: dict[str, Any], says: str) -> None:
    settings = dict(settings)
    data = settings.pop("data", {})
    step = step_of("eager", **settings)
    config = change(step.config, training={"compile": True}, data=data)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    context = ParallelContext.single()
    (line,) = list(_compiled(config, context, dtype, step.chunks))
    assert line.startswith("\ncompiled: ")
    assert line.endswith(says)


def test_large_products_in_a_graph_go_to_onednn(runs: list[int]) -> None:
    linear = find_linear()
    if linear is None:
        pytest.skip("this build of torch has no oneDNN")
    products = OneDnnProducts(linear, LeastWork(1, 1))
    step = step_of("aot_eager", products, **GPT2)
    train(step, 1)  # traces
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        train(step, 1)
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert runs
    # Of a layer four products, each with the gradients of its input and its weight.
    assert counts["completep_products::linear"] == 4 * LAYERS * 4 * 3


def test_the_gradients_of_a_product_through_onednn_are_those_of_float64() -> None:
    if find_linear() is None:
        pytest.skip("this build of torch has no oneDNN")
    x = torch.randn(3, 2, 8, requires_grad=True)
    weight = torch.randn(5, 8, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    inputs = (x, weight, bias)
    d_out = torch.randn(3, 2, 5)
    wide = [each.detach().double().requires_grad_() for each in inputs]
    expected = torch.autograd.grad(torch.nn.functional.linear(*wide), wide, d_out.double())
    for least in (LeastWork(1, 1), LeastWork(1, None), LeastWork(1 << 40, None)):
        out = TracedProducts(least).linear(*inputs)
        gradients = torch.autograd.grad(out, inputs, d_out)
        for gradient, exact in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-5)


def test_blocks_run_where_graphs_do_not_serve(runs: list[int]) -> None:
    step = step_of("eager")
    (chunk,) = step.chunks
    batch = random_batch(BenchmarkSettings(step.config.model, 2))

    def train_once() -> int:
        runs.clear()
        train(step, 1)
        return len(runs)

    assert train_once() == 8  # the control
    output = chunk.blocks()[-1][1].attention.output
    for register in (
        output.register_forward_pre_hook,
        output.register_forward_hook,
        output.register_full_backward_hook,
    ):
        handle = register(lambda *_: None)
        assert train_once() == 0
        handle.remove()
    assert train_once() == 8
    runs.clear()
    step.evaluate([batch])
    documents = torch.zeros_like(batch.tokens)
    chunk(batch.tokens, labels=batch.labels, document_ids=documents)
    assert not runs
    chunk(batch.tokens, labels=batch.labels)
    assert len(runs) == 2  # the control


@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": 0.1},
        {"position": "alibi"},
        {"attention_backend": "sdpa"},
        {"moe": {"num_experts": 2, "top_k": 1}},
        {"training": {"recompute": "selective"}},
        {"precision": "float64"},
        {},
    ],
    ids=str,
)
def test_models_that_graphs_do_not_serve_are_left_to_the_blocks(
    settings: dict[str, Any], runs: list[int]
) -> None:
    step = step_of("eager", num_layers=1, **settings)
    train(step, 1)
    assert bool(runs) == (settings == {})


def test_nothing_is_compiled_again_between_steps_and_validations() -> None:
    step = step_of("eager")
    batch = random_batch(BenchmarkSettings(step.config.model, 2))

    def round_of_everything() -> int:
        train(step, 2)
        step.evaluate([batch])
        handle = step.chunks[0].layers["0"].register_forward_hook(lambda *_: None)
        train(step, 1)
        handle.remove()
        train(step, 1)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    torch._dynamo.utils.counters.clear()
    first = round_of_everything()
    assert first >= 2
    assert round_of_everything() == first
    assert not torch._dynamo.utils.counters["graph_break"]
