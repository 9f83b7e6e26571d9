"""SwiGLU, squared ReLU and rotary embedding:
Triton kernels (interpreter or GPU) and CPU path against float64.
"""

import importlib
from functools import partial

import pytest
import torch

from megatron_completep.kernels import reference
from megatron_completep.kernels.cpu import pointwise as cpu
from megatron_completep.kernels.ops import join_heads, rotary, squared_relu, swiglu
from tests.kernels.norm_cases import TOLERANCE, assert_close, poisoned_allocations
from tests.kernels.step_kernels import DEVICE, launchers, mutant

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# torch's bf16 operators round in between; the kernels round once.
CPU_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
SWIGLU = {"triton": (launchers(swiglu), TOLERANCE), "cpu": (cpu, CPU_TOLERANCE)}
SQUARED_RELU = {"triton": (launchers(squared_relu), TOLERANCE), "cpu": (cpu, CPU_TOLERANCE)}
JOIN = {"triton": (launchers(join_heads), TOLERANCE), "cpu": (cpu, CPU_TOLERANCE)}
ROTARY = {"triton": (launchers(rotary), TOLERANCE), "cpu": (cpu, CPU_TOLERANCE)}


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def expected_gradient(function, x, d_out):
    leaf = x.double().cpu().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, d_out.double().cpu())[0]


def check_swiglu(module, tolerance, shape, dtype, stride=0):
    *leading, half = shape
    gate_up = random(*leading, 2 * half + stride, dtype=dtype)[..., : 2 * half]
    d_out = random(*shape, dtype=dtype, seed=1)
    assert_close(
        module.swiglu_forward(gate_up),
        reference.swiglu(gate_up.double().cpu()),
        tolerance[dtype],
        "out",
    )
    gradient = module.swiglu_backward(d_out, gate_up)
    assert gradient.is_contiguous() and gradient.dtype == dtype
    assert_close(
        gradient, expected_gradient(reference.swiglu, gate_up, d_out), tolerance[dtype], "d_gate_up"
    )


@pytest.mark.parametrize("name", SWIGLU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 100), (3, 2730), (1, 1), (5, 64), (0, 64)], ids=str)
def test_swiglu_matches_float64(name, dtype, shape, monkeypatch):
    module, tolerance = SWIGLU[name]
    with poisoned_allocations(monkeypatch) if name == "triton" else monkeypatch.context():
        check_swiglu(module, tolerance, shape, dtype)


@pytest.mark.parametrize("name", SWIGLU)
def test_swiglu_reads_strided_rows(name):
    check_swiglu(*SWIGLU[name], (7, 96), torch.float32, stride=64)


@pytest.mark.parametrize("name", SQUARED_RELU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 100), (2049,), (1,), (0, 8)], ids=str)
def test_squared_relu_matches_float64(name, dtype, shape, monkeypatch):
    module, tolerance = SQUARED_RELU[name]
    x, d_out = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    with poisoned_allocations(monkeypatch) if name == "triton" else monkeypatch.context():
        out, gradient = module.squared_relu_forward(x), module.squared_relu_backward(d_out, x)
    assert_close(out, reference.squared_relu(x.double().cpu()), tolerance[dtype], "out")
    assert_close(
        gradient, expected_gradient(reference.squared_relu, x, d_out), tolerance[dtype], "d_x"
    )


@pytest.mark.parametrize("name", SQUARED_RELU)
def test_squared_relu_passes_nan_on(name):
    """A fused activation that turns NaN into 0 would hide a broken run."""
    module, _ = SQUARED_RELU[name]
    x = torch.tensor([float("nan"), -1.0, 2.0], device=DEVICE)
    assert module.squared_relu_forward(x).isnan().tolist() == [True, False, False]


def angles(sequence, batch, half):
    angle = torch.rand(sequence, batch, half, generator=torch.Generator().manual_seed(5)) * 6.3
    return angle.cos().to(DEVICE), angle.sin().to(DEVICE)


def check_rotary(module, tolerance, shape, dtype, batch_angles=1, inverse=False):
    sequence, batch, heads, head_dim = shape
    cos, sin = angles(sequence, batch_angles, head_dim // 2)
    # Q of a fused projection: only the last dimension is dense.
    fused = random(sequence, batch, heads, 3 * head_dim, dtype=dtype)
    x = fused[..., :head_dim]
    expected = reference.rotary(x.double().cpu(), cos.double().cpu(), sin.double().cpu(), inverse)
    out = module.rotary(x, cos, sin, inverse)
    assert out.is_contiguous()
    assert_close(out, expected, tolerance[dtype], "out")
    rest = fused[..., head_dim:].clone()
    module.rotary_(x, cos, sin, inverse)
    assert torch.equal(x, out), "in place differs"
    assert torch.equal(fused[..., head_dim:], rest), "the neighbours of a view were written"


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    "shape, batch_angles",
    [((5, 2, 3, 64), 1), ((3, 2, 1, 20), 2), ((1, 3, 17, 2), 3), ((2, 1, 20, 128), 1)],
)
def test_rotary_matches_float64_in_place_and_not(name, dtype, inverse, shape, batch_angles):
    check_rotary(*ROTARY[name], shape, dtype, batch_angles, inverse)


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_inverse_undoes_it(name):
    module, _ = ROTARY[name]
    x = random(4, 2, 3, 32)
    cos, sin = angles(4, 1, 16)
    assert_close(
        module.rotary(module.rotary(x, cos, sin, False), cos, sin, True),
        x.double(),
        1e-6,
        "there and back",
    )


def check_join_heads(module, tolerance, shape, dtype, batch_angles=1):
    """Gradients [B, N, S, D] in memory, as attention leaves them; the last one is not dense."""
    sequence, batch, queries, keys, head_dim = shape
    cos, sin = angles(sequence, batch_angles, head_dim // 2)
    d_q = random(batch, queries, sequence, head_dim, dtype=dtype).permute(2, 0, 1, 3)
    d_k = random(batch, keys, sequence, head_dim, dtype=dtype).permute(2, 0, 1, 3)
    d_v = random(sequence, batch, head_dim, keys, dtype=dtype).transpose(2, 3)

    # From autograd, through the forward pass that the operation is the gradient of.
    heads = torch.zeros(sequence, batch, queries + 2 * keys, head_dim, dtype=torch.float64)
    heads.requires_grad_()
    q, k, v = heads.split((queries, keys, keys), dim=2)
    rotated = [reference.rotary(x, cos.double().cpu(), sin.double().cpu()) for x in (q, k)]
    gradients = [d.double().cpu() for d in (d_q, d_k, d_v)]
    (expected,) = torch.autograd.grad((*rotated, v), heads, gradients)

    out = module.join_heads(d_q, d_k, d_v, cos, sin)
    assert out.is_contiguous()
    assert_close(out, expected, tolerance[dtype], "out")


@pytest.mark.parametrize("name", JOIN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, batch_angles",
    [((5, 2, 3, 1, 64), 1), ((3, 2, 2, 2, 20), 2), ((1, 3, 17, 5, 2), 3), ((2, 1, 20, 4, 128), 1)],
)
def test_joined_heads_are_the_gradient_of_rotated_ones(name, dtype, shape, batch_angles):
    check_join_heads(*JOIN[name], shape, dtype, batch_angles)


def swiglu_far_away(module):
    gate_up = torch.zeros(4, 2048)
    module.launch_swiglu_forward(gate_up)
    module.launch_swiglu_backward(torch.zeros(4, 1024), gate_up)


def squared_relu_far_away(module):
    module.launch_squared_relu_forward(torch.zeros(64))
    module.launch_squared_relu_backward(torch.zeros(64), torch.zeros(64))


def rotary_far_away(module):
    module.launch_rotary_(
        torch.zeros(1, 1, 32, 128), torch.zeros(1, 1, 64), torch.zeros(1, 1, 64), False
    )


def join_heads_far_away(module):
    heads = torch.zeros(1, 1, 32, 128)
    module.launch_join_heads(heads, heads, heads, torch.zeros(1, 1, 64), torch.zeros(1, 1, 64))


def float8_far_away(module):
    module.launch_cast(torch.zeros(64, 64), torch.ones(()), False, True)


FAR = {
    "ops.float8": float8_far_away,
    "ops.join_heads": join_heads_far_away,
    "ops.swiglu": swiglu_far_away,
    "ops.squared_relu": squared_relu_far_away,
    "ops.rotary": rotary_far_away,
}


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's overflow check")
@pytest.mark.parametrize("module", FAR)
def test_addresses_beyond_two_to_the_31_do_not_overflow_and_32_bits_would(module, far_away):
    from triton.runtime.errors import InterpreterError

    FAR[module](importlib.import_module(f"megatron_completep.kernels.{module}"))
    with pytest.raises(InterpreterError, match="overflow"):
        FAR[module](mutant(module, ".to(tl.int64)", ""))


def notices_swiglu(module):
    check_swiglu(module, TOLERANCE, (3, 100), torch.float32)


def notices_rotary(module, **options):
    check_rotary(module, TOLERANCE, (3, 2, 3, 64), torch.float32, **options)


def notices_join_heads(module):
    check_join_heads(module, TOLERANCE, (3, 2, 3, 2, 64), torch.float32)


# What goes wrong: (module, the text, the text instead, the check that notices).
MUTANTS = {
    "the gate's own slope is lost": (
        "ops.swiglu",
        "(1.0 + gate * (1.0 - sigmoid))",
        "1.0",
        notices_swiglu,
    ),
    "gate and up change places": (
        "ops.swiglu",
        "gate_up + row * stride + F + column",
        "gate_up + row * stride + column",
        notices_swiglu,
    ),
    "the inverse turns the same way": (
        "ops.rotary",
        "sine = -sine",
        "sine = sine",
        partial(notices_rotary, inverse=True),
    ),
    "joined heads are rotated forward": (
        "ops.join_heads",
        "turned_low * cosine + turned_high * sine",
        "turned_low * cosine - turned_high * sine",
        notices_join_heads,
    ),
    "values take the places of keys": (
        "ops.join_heads",
        "value = key - keys",
        "value = key",
        notices_join_heads,
    ),
    "every sequence has the first one's positions": (
        "ops.rotary",
        "cos, sin, s, b, cos_stride_s",
        "cos, sin, s, 0 * b, cos_stride_s",
        partial(notices_rotary, batch_angles=2),
    ),
}


@pytest.mark.parametrize("slip", MUTANTS)
def test_check_catches_the_mutant_in_which(slip):
    module, old, new, check = MUTANTS[slip]
    broken = launchers(mutant(module, old, new))
    with pytest.raises(AssertionError, match="relative error"):
        check(broken)
