"""What torch knows about the operations:
schemas, shapes without data, gradients, compilation, and how they are dispatched.
"""

import importlib
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_completep import kernels
from megatron_completep.kernels import Join, Norm, reference
from megatron_completep.kernels.cpu import pointwise
from megatron_completep.kernels.library import LAUNCHERS
from megatron_completep.kernels.ops import squared_relu

H = 24
OPERATORS = torch.ops.completep


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64
    ).to(dtype)


KINDS = ("layernorm", "rmsnorm")


def saved_statistics(rms):
    return (torch.empty(0) if rms else random(6)), random(6).abs() + 0.5


def samples():
    """(operator, arguments) for every operation of the model,
    with and without each optional argument.
    """
    x, vector, seed = random(2, 3, H), random(H), kernels.dropout_seed(7)
    dropping, plain = (0.5, 0.25, seed), (0.5, 0.0, None)  # the fields of a Join
    for kind in KINDS:
        norm = (kind, 1e-5)
        mean, rstd = saved_statistics(kind == "rmsnorm")
        yield (
            "norm_forward",
            (x, vector, None if kind == "rmsnorm" else vector, *norm, torch.bfloat16),
        )
        yield "residual_norm_forward", (x, x, vector, vector, vector, *dropping, *norm)
        yield "residual_norm_forward", (x, x.bfloat16(), None, vector, None, *plain, *norm)
        yield (
            "residual_norm_backward",
            (x, x, x, mean, rstd, vector, True, True, True, *dropping, *norm),
        )
        yield (
            "residual_norm_backward",
            (None, x, x, mean, rstd, vector, False, False, False, *plain, *norm),
        )
    yield "scaled_add_forward", (x, x, vector, *dropping)
    yield "scaled_add_forward", (x, x, None, *plain)
    yield "scaled_add_backward", (x, True, *dropping, torch.bfloat16)
    yield "scaled_add_backward", (x, False, *plain, torch.float32)
    yield "reduce_partials_", (random(4, 3, H), vector.clone(), None, vector.clone(), 0b100)
    yield "swiglu_forward", (x,)
    yield "swiglu_backward", (x[..., : H // 2].contiguous(), x)
    yield "squared_relu_forward", (x,)
    yield "squared_relu_backward", (x, x)
    cos, sin = random(2, 1, 4), random(2, 1, 4)
    yield "rotary", (random(2, 3, 2, 8), cos, sin, True)
    yield "rotary_", (random(2, 3, 2, 8), cos, sin, False)
    # Gradients as attention leaves them: heads before the sequence in memory.
    permuted = [random(3, count, 2, 8).permute(2, 0, 1, 3) for count in (4, 2, 2)]
    yield "join_heads", (*permuted, cos, sin)
    gain = random(8)
    heads = random(2, 3, 8, 8)
    yield "head_norm_forward", (heads, gain, gain, cos, sin, 4, 1e-5)
    queries, keys = random(2, 3, 4, 8), random(2, 3, 2, 8)
    rstds = (random(24), random(12))
    yield "head_norm_backward", (queries, keys, keys, heads, *rstds, gain, gain, cos, sin)
    matrix = random(6, 10)
    yield "float8_largest", (matrix,)
    yield "float8_cast", (matrix, matrix.abs().max(), False, False)
    yield "float8_cast", (matrix, matrix.abs().max(), True, True)
    segments = torch.tensor([[0, 70, 1], [128, 64, 0]])
    yield "float8_largest_of_segments", (random(192), segments, 2)


SAMPLES = list(samples())


@pytest.mark.parametrize("index", range(len(SAMPLES)), ids=[name for name, _ in SAMPLES])
def test_opcheck_passes(index):
    name, arguments = SAMPLES[index]
    torch.library.opcheck(getattr(OPERATORS, name).default, arguments)


OF_THE_OPTIMIZER_AND_THE_LOSS = {
    "adamw_",
    "sum_of_squares",
    "begin_step_",
    "cross_entropy_forward",
    "cross_entropy_backward_",
}


def test_every_operator_is_sampled_here_or_beside_its_own_tests():
    assert set(LAUNCHERS) == {name for name, _ in SAMPLES} | OF_THE_OPTIMIZER_AND_THE_LOSS
    folder = Path(__file__).parent
    files = ("test_adamw.py", "test_grad_norm.py", "test_cross_entropy.py")
    # Without white space, wherever the formatter breaks a call.
    checked = "".join("".join((folder / name).read_text().split()) for name in files)
    for name in OF_THE_OPTIMIZER_AND_THE_LOSS:
        assert f"opcheck(torch.ops.completep.{name}.default" in checked, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradients_of_the_residual_norm_are_right_in_float64(kind, optional, dropout_p):
    names = ("residual", "branch", "branch_bias", "weight", "bias")
    given = {
        name: random(*((2, 6) if k < 2 else (6,)), dtype=torch.float64, seed=k)
        for k, name in enumerate(names)
    }
    if not optional:
        given["branch_bias"] = given["bias"] = None
    join = Join(0.3, dropout_p, kernels.dropout_seed(11) if dropout_p else None)
    leaves = [tensor.requires_grad_() for tensor in given.values() if tensor is not None]

    def function(*leaves):
        values = iter(leaves)
        arguments = [None if tensor is None else next(values) for tensor in given.values()]
        return kernels.scaled_residual_norm(*arguments, join, Norm(kind))

    assert torch.autograd.gradcheck(function, leaves)


def test_gradients_of_the_other_operations_are_right_in_float64():
    x = random(2, 3, H, dtype=torch.float64).requires_grad_()
    vector = random(H, dtype=torch.float64, seed=1).requires_grad_()
    bias = random(H, dtype=torch.float64, seed=2).requires_grad_()
    heads = random(2, 3, 2, 8, dtype=torch.float64).requires_grad_()
    angle = random(2, 1, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w, b: kernels.norm(x, w, b, Norm()), (x, vector, bias)
    )
    assert torch.autograd.gradcheck(
        lambda x, w: kernels.norm(x, w, None, Norm("rmsnorm")), (x, vector)
    )
    branch = random(2, 3, H, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, y, b: kernels.scaled_add(x, y, b, Join(0.3)), (x, branch, bias)
    )
    assert torch.autograd.gradcheck(kernels.swiglu, x)
    assert torch.autograd.gradcheck(kernels.squared_relu, x)
    assert torch.autograd.gradcheck(lambda q: kernels.rotary(q, angle.cos(), angle.sin()), heads)


def test_gradcheck_notices_a_wrong_gradient(monkeypatch):
    monkeypatch.setattr(
        squared_relu,
        "_squared_relu_backward",
        lambda d_out, x: 1.01 * pointwise.squared_relu_backward(d_out, x),
    )
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(
            kernels.squared_relu, random(2, 3, dtype=torch.float64).abs().requires_grad_()
        )


def test_an_unused_output_of_the_residual_norm_costs_no_gradient():
    residual = random(4, H).requires_grad_()
    branch = random(4, H, seed=1)
    weight = random(H, seed=2)
    y, _ = kernels.scaled_residual_norm(residual, branch, None, weight, None, Join(0.5), Norm())
    (gradient,) = torch.autograd.grad(y.sum(), residual)
    assert torch.equal(gradient, torch.ones_like(residual))


def block(residual, branch, weight, bias, gate_up_weight, cos, sin, seed):
    """One of everything."""
    join = Join(0.5, 0.25, seed)
    y, x = kernels.scaled_residual_norm(residual, branch, bias, weight, None, join, Norm("rmsnorm"))
    x = kernels.rotary(x.unflatten(-1, (3, 8)), cos, sin).flatten(2)
    x = kernels.squared_relu(kernels.swiglu(x @ gate_up_weight))
    return kernels.scaled_add(kernels.norm(y, weight, bias, Norm()), x, bias, join).square().sum()


def block_inputs():
    leaves = [
        random(2, 3, H),
        random(2, 3, H, seed=1),
        random(H, seed=2),
        random(H, seed=4),
        random(H, 2 * H, seed=3),
    ]
    fixed = random(2, 1, 4).cos(), random(2, 1, 4).sin(), kernels.dropout_seed(5)
    return [leaf.requires_grad_() for leaf in leaves], fixed


def test_torch_compile_traces_through_every_operation_without_a_break():
    """With dropout, whose seed is a tensor inside a value:
    the second seed must not find the first one's mask.
    """
    leaves, (cos, sin, seed) = block_inputs()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for each in (seed, kernels.dropout_seed(6)):
        plain = torch.autograd.grad(block(*leaves, cos, sin, each), leaves)
        traced = torch.autograd.grad(compiled(*leaves, cos, sin, each), leaves)
        for a, b in zip(plain, traced, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    other = torch.autograd.grad(block(*leaves, cos, sin, seed), leaves)
    assert not torch.allclose(other[1], plain[1]), "the negative control: the seeds drop the same"


def test_the_profiler_sees_the_fused_operations_forward_and_backward():
    leaves, fixed = block_inputs()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        block(*leaves, *fixed).backward()
    seen = {event.key for event in trace.key_averages()}
    pairs = ("residual_norm", "swiglu", "squared_relu", "scaled_add")
    expected = {f"{name}_{way}" for name in pairs for way in ("forward", "backward")} | {
        "norm_forward",
        "rotary",
        "reduce_partials_",
    }
    assert {f"completep::{name}" for name in expected} <= seen


def test_dropout_without_a_seed_is_refused():
    x = random(2, H)
    with pytest.raises(ValueError, match=r"dropout_p = 0\.5 needs a seed"):
        kernels.scaled_add(x, x, None, Join(1.0, 0.5))
    with pytest.raises(ValueError, match="needs a seed"):  # where no value is read, as on a GPU
        kernels.scaled_residual_norm(
            x.to("meta"), x.to("meta"), None, x[0].to("meta"), None, Join(1.0, 0.5), Norm()
        )


def test_a_kind_of_norm_that_is_not_defined_is_refused():
    x = random(2, H)
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=r'kind = .rms. must be "layernorm" or "rmsnorm"'):
            kernels.norm(x.to(device), x[0].to(device), None, Norm("rms"))


def test_importing_every_module_leaves_the_public_functions_in_place():
    """A module named like a function would take its place in the package when it is imported."""
    names = {module.name for module in pkgutil.iter_modules(kernels.__path__)}
    assert not names & set(kernels.__all__)
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        importlib.import_module(module.name)
    assert not [
        name for name in kernels.__all__ if isinstance(getattr(kernels, name), types.ModuleType)
    ]


def test_cpu_tensors_need_no_triton():
    program = """
import sys
sys.modules["triton"] = None  # an import of it now fails
import torch
from megatron_completep import kernels
x = torch.randn(4, 8, requires_grad=True)
kernels.swiglu(kernels.norm(x, torch.ones(8), None, kernels.Norm())).sum().backward()
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=120)


def test_the_folder_imported_as_a_package_of_its_own_is_empty():
    """Libraries probe for a package called kernels;
    a second registration of the operators would fail.
    """
    probed = importlib.import_module("kernels")
    assert not hasattr(probed, "norm")
    assert not [name for name in sys.modules if name.startswith("kernels.")]


def test_operations_agree_with_their_definition_across_dtypes():
    x, weight = random(4, H, dtype=torch.bfloat16), random(H, dtype=torch.bfloat16)
    ours, defined = (norm(x, weight, None, Norm()) for norm in (kernels.norm, reference.norm))
    torch.testing.assert_close(ours, defined, rtol=1e-2, atol=1e-2)
