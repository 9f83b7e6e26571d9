"""The definitions compiled in place of the operators: equal results, for the tensors they serve."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_completep import kernels
from megatron_completep.kernels import CompiledDefinitions, Join, Norm
from tests.kernels.norm_cases import relative_error

H = 40
SEED = kernels.dropout_seed(11)
# ||a - b|| / ||b|| against float64: one rounding to the type, and sums over rows in float32.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3}


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rows(count: int) -> list[Tensor]:
    return [random(3, 4, H, seed=seed) for seed in range(count)]


def vectors(count: int) -> list[Tensor]:
    return [1 + random(H, seed=10 + seed) for seed in range(count)]


def rotate(x: Tensor, inverse: bool, compiled: CompiledDefinitions | None) -> Tensor:
    angle = random(3, 1, 4, seed=5)
    table = torch.float64 if x.dtype == torch.float64 else torch.float32
    return kernels.rotary(x, angle.cos().to(table), angle.sin().to(table), inverse, compiled)


def residual_norm(kind: str, dropout_p: float = 0.0) -> Callable[..., Any]:
    join = Join(0.3, dropout_p, SEED if dropout_p else None)

    def call(residual, branch, branch_bias, weight, bias=None, compiled=None):
        vectors = (branch_bias, weight, bias)
        return kernels.scaled_residual_norm(
            residual, branch, *vectors, join, Norm(kind), compiled=compiled
        )

    return call


# The operation, and its inputs in float64.
OPERATIONS: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "layernorm": (residual_norm("layernorm"), rows(2) + vectors(3)),
    "rmsnorm": (residual_norm("rmsnorm"), rows(2) + vectors(2)),
    "dropout": (residual_norm("rmsnorm", 0.25), rows(2) + vectors(2)),
    "norm alone": (
        lambda x, weight, bias, compiled: kernels.norm(x, weight, bias, Norm(), compiled=compiled),
        rows(1) + vectors(2),
    ),
    "swiglu": (lambda x, compiled: kernels.swiglu(x, compiled), rows(1)),
    "squared_relu": (lambda x, compiled: kernels.squared_relu(x, compiled), rows(1)),
    "rotary": (lambda x, compiled: rotate(x, False, compiled), [random(3, 2, 5, 8)]),
    "inverse rotary": (lambda x, compiled: rotate(x, True, compiled), [random(3, 2, 5, 8)]),
}


def results(
    name: str, dtype: torch.dtype, compiled: CompiledDefinitions | None, rounded: torch.dtype
) -> list[Tensor]:
    """Outputs and every gradient, of inputs that hold what `rounded` can hold."""
    operation, inputs = OPERATIONS[name]
    leaves = [x.to(rounded).to(dtype).requires_grad_() for x in inputs]
    outputs = operation(*leaves, compiled=compiled)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    d_outputs = []
    for number, out in enumerate(outputs):
        d_outputs.append(random(*out.shape, seed=20 + number).to(rounded).to(dtype))
    gradients = torch.autograd.grad(outputs, leaves, d_outputs)
    return [*(out.detach() for out in outputs), *gradients]


def check(name: str, dtype: torch.dtype, compiled: CompiledDefinitions) -> None:
    exact = results(name, torch.float64, None, rounded=dtype)
    operators = results(name, dtype, None, rounded=dtype)
    found = results(name, dtype, compiled, rounded=dtype)
    for number, (ours, native, expected) in enumerate(zip(found, operators, exact, strict=True)):
        assert ours.dtype == native.dtype and ours.shape == native.shape
        error = relative_error(ours, expected)
        assert error <= TOLERANCE[dtype], f"{name}, result {number}: relative error {error:.1e}"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_traced_definition_gives_outputs_and_every_gradient(name, dtype):
    """Traced and differentiated as for Inductor, whose part the slow suite runs."""
    check(name, dtype, CompiledDefinitions("aot_eager"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_inductor_gives_outputs_and_every_gradient(name, dtype):
    check(name, dtype, CompiledDefinitions())


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_compiler_that_computes_something_else_is_caught(name):
    def scaling(graph, inputs):
        return lambda *arguments: [1.01 * out for out in graph(*arguments)]

    with pytest.raises(AssertionError, match="relative error"):
        check(name, torch.bfloat16, CompiledDefinitions(scaling))


def refusing(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    raise AssertionError("something was compiled")


@pytest.mark.parametrize("name", OPERATIONS)
def test_float64_is_never_compiled_and_keeps_its_bits(name):
    plain = results(name, torch.float64, None, rounded=torch.float64)
    served = results(name, torch.float64, CompiledDefinitions(refusing), rounded=torch.float64)
    assert all(map(torch.equal, plain, served))


def test_rotation_in_place_is_that_out_of_place_and_spares_the_neighbours():
    compiled = CompiledDefinitions("aot_eager")
    fused = random(3, 2, 5, 12).float()
    cos, sin = random(3, 1, 4).cos().float(), random(3, 1, 4).sin().float()
    x = fused[..., :8]
    expected = kernels.rotary(x, cos, sin)
    neighbours = fused[..., 8:].clone()
    kernels.rotary_(x, cos, sin, False, compiled)
    torch.testing.assert_close(x, expected)
    assert torch.equal(fused[..., 8:], neighbours)
