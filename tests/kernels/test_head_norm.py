"""QK-norm with rotation: the Triton kernels (interpreter or GPU) and the CPU path against the
definition in float64, over strided heads; and one pass where there were three.
"""

import importlib
from functools import partial

import pytest
import torch

from megatron_completep import kernels
from megatron_completep.kernels import Norm, reference
from megatron_completep.kernels.cpu import head_norm as cpu
from megatron_completep.kernels.ops import head_norm
from tests.kernels.norm_cases import TOLERANCE, assert_close
from tests.kernels.step_kernels import DEVICE, launchers, mutant

NORM = Norm("rmsnorm", 1e-5)
# Norm and rotation round one after the other; torch's operators in between as well.
CPU_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
ROUNDED_TWICE = {dtype: 2 * tolerance for dtype, tolerance in TOLERANCE.items()}
IMPLEMENTATIONS = {"triton": (launchers(head_norm), ROUNDED_TWICE), "cpu": (cpu, CPU_TOLERANCE)}
SHAPES = [  # sequence, batch, heads of queries, of keys, size of a head
    (5, 2, 3, 3, 16),
    (3, 2, 6, 2, 20),
    (2, 1, 17, 1, 64),
]


def random(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def check(module, tolerance, shape, dtype, batch_angles=1):
    sequence, batch, queries, keys, size = shape
    # The heads are a slice of a wider buffer, and gradients come as attention leaves them.
    heads = random(sequence, batch, queries + 2 * keys, size + 8, dtype=dtype)[..., :size]
    gains = [1.0 + 0.3 * random(size, seed=seed) for seed in (1, 2)]
    gains = [gain.to(dtype) for gain in gains]
    angle = random(sequence, batch_angles, size // 2, seed=3)
    cos, sin = angle.cos().float(), angle.sin().float()
    gradients = [
        random(batch, count, sequence, size, dtype=dtype, seed=4).permute(2, 0, 1, 3)
        for count in (queries, keys, keys)
    ]

    leaves = [t.double().cpu().requires_grad_() for t in (heads, *gains)]
    wide_angles = (cos.double().cpu(), sin.double().cpu())
    expected = reference.normed_heads(*leaves, *wide_angles, queries, NORM)
    d_expected = torch.autograd.grad(expected, leaves, [d.double().cpu() for d in gradients])

    q, k, q_rstd, k_rstd = module.head_norm_forward(heads, *gains, cos, sin, queries, NORM.eps)
    assert_close(q, expected[0].detach(), tolerance[dtype], "q")
    assert_close(k, expected[1].detach(), tolerance[dtype], "k")
    d_heads, partials = module.head_norm_backward(
        *gradients, heads, q_rstd, k_rstd, *gains, cos, sin
    )
    assert_close(d_heads, d_expected[0], tolerance[dtype], "d_heads")
    sums = partials.double().sum(0)
    assert_close(sums[0], d_expected[1], tolerance[dtype], "d_q_gain")
    assert_close(sums[1], d_expected[2], tolerance[dtype], "d_k_gain")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_matches_float64_over_strided_heads(name, dtype, shape):
    check(*IMPLEMENTATIONS[name], shape, dtype, batch_angles=shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_it_has_the_bits_of_the_norm_and_the_rotation_that_it_joins(dtype):
    heads = random(4, 2, 6, 16, dtype=dtype).requires_grad_()
    gains = [(1.0 + random(16, seed=seed)).to(dtype).requires_grad_() for seed in (1, 2)]
    angle = random(4, 1, 8, seed=3)
    cos, sin = angle.cos().float(), angle.sin().float()
    q, k, v = heads.split((2, 2, 2), dim=2)
    plain = [
        kernels.rotary(kernels.norm(part, gain, None, NORM), cos, sin)
        for part, gain in ((q, gains[0]), (k, gains[1]))
    ]
    joined = kernels.normed_heads(heads, *gains, cos, sin, 2, NORM)
    for ours, theirs in zip(joined, (*plain, v), strict=True):
        assert torch.equal(ours, theirs)
    gradients = [random(4, 2, 2, 16, dtype=dtype, seed=seed) for seed in (5, 6, 7)]
    leaves = [heads, *gains]
    expected = torch.autograd.grad([*plain, v], leaves, gradients)
    for ours, theirs in zip(torch.autograd.grad(joined, leaves, gradients), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_gradient_is_that_of_finite_differences_and_a_layernorm_is_refused():
    heads = random(2, 1, 4, 6).requires_grad_()
    gains = [random(6, seed=seed).requires_grad_() for seed in (1, 2)]
    angle = random(2, 1, 3, seed=3)
    joined = partial(
        kernels.normed_heads, cos=angle.cos(), sin=angle.sin(), query_heads=2, norm=NORM
    )
    assert torch.autograd.gradcheck(joined, (heads, *gains))
    with pytest.raises(ValueError, match='"layernorm" of a norm of heads must be "rmsnorm"'):
        kernels.normed_heads(heads, *gains, angle.cos(), angle.sin(), 2, Norm("layernorm"))


# What goes wrong: (the text, the text instead).
MUTANTS = {
    "keys have the gain of queries": ("tl.where(is_query, q_low_gain, k_low_gain)", "q_low_gain"),
    "the gradient is turned the same way": (
        "turned_low * cosine + turned_high * sine",
        "turned_low * cosine - turned_high * sine",
    ),
    "the component along the head stays": ("(d_low - low * along)", "d_low"),
    "the keys' part of a gain is the queries'": (
        "tl.where(is_key, d_low * low, 0.0)",
        "tl.where(is_query, d_low * low, 0.0)",
    ),
}


@pytest.mark.parametrize("slip", MUTANTS)
def test_check_catches_the_mutant_in_which(slip):
    broken = launchers(mutant("ops.head_norm", *MUTANTS[slip]))
    with pytest.raises(AssertionError, match="relative error"):
        check(broken, ROUNDED_TWICE, SHAPES[1], torch.float32, batch_angles=2)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's overflow check")
def test_addresses_beyond_two_to_the_31_do_not_overflow_and_32_bits_would(far_away):
    from triton.runtime.errors import InterpreterError

    arguments = (
        torch.zeros(1, 1, 24, 128),
        *torch.ones(2, 128),
        *torch.zeros(2, 1, 1, 64),
        8,
        1e-5,
    )
    importlib.import_module("megatron_completep.kernels.ops.head_norm")
    head_norm.launch_head_norm_forward(*arguments)
    with pytest.raises(InterpreterError, match="overflow"):
        mutant("ops.head_norm", ".to(tl.int64)", "").launch_head_norm_forward(*arguments)
