"""The scaled residual norm: Triton kernels (interpreter or GPU) and CPU path,
each half alone and both together.
"""

import dataclasses
import importlib

import pytest
import torch

from megatron_completep import kernels
from megatron_completep.kernels import Join, Norm, launch, reference
from megatron_completep.kernels.cpu import residual_norm as cpu
from megatron_completep.kernels.ops import partial_sums, scaled_add
from megatron_completep.kernels.ops import residual_norm as residual_norm_module
from tests.kernels import norm_cases
from tests.kernels.norm_cases import (
    EPS,
    SEED,
    Case,
    backward,
    check_backward,
    check_forward,
    forward,
    poisoned_allocations,
    relative_error,
)
from tests.kernels.step_kernels import DEVICE, launchers, mutant

BF16 = torch.bfloat16
# The interpreter launches 3 programs of 1 or 2 rows in the backward (launch.py), so 2, 3, 4 rows
# lie round P, and 17 loops.
CASES = [
    Case(1, 1, bias=True, branch_bias=True),
    Case(7, 5, BF16, branch_bias=True, dropout_p=0.3),
    Case(0, 64, bias=True, branch_bias=True),
    Case(2, 64, BF16, rms=True),
    Case(3, 100, bias=True, branch_bias=True),
    Case(4, 100, BF16, bias=True, branch_bias=True, dropout_p=0.3),
    Case(17, 100, rms=True, branch_bias=True, stride=28),
    Case(17, 768, BF16, bias=True, branch_bias=True),
    Case(2, 768, dropout_p=0.1, bias=True, branch_bias=True),
    Case(3, 768, torch.float16, rms=True, residual_dtype=torch.float32),
    Case(4, 640, torch.float16, bias=True, branch_bias=True),
    Case(5, 1000, BF16, rms=True, residual_dtype=torch.float32, branch_bias=True),
    Case(3, 1024, d_y=False, bias=True),
    Case(4, 1536, branch=False, bias=True),
    Case(5, 768, BF16, branch=False, rms=True, stride=256, d_y=False),
    Case(4, 5120, BF16, bias=True, branch_bias=True),
    Case(7, 5120, rms=True, dropout_p=0.5),
    Case(2, 16384, bias=True, branch_bias=True),
    Case(3, 9000, BF16, rms=True, branch_bias=True, dropout_p=0.25),
]
residual_norm = launchers(residual_norm_module, scaled_add, partial_sums)
IMPLEMENTATIONS = {"triton": residual_norm, "cpu": cpu}
LAYERNORM = Norm("layernorm", EPS)


def identity(case):
    return "-".join(
        str(getattr(case, field.name)).removeprefix("torch.") for field in dataclasses.fields(case)
    )


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_kernels_match_float64_and_write_every_element_of_their_outputs_only(case, monkeypatch):
    check_forward(residual_norm, case, poisoned_allocations(monkeypatch))
    check_backward(residual_norm, case, poisoned_allocations(monkeypatch))


@pytest.mark.parametrize("case", [c for c in CASES if 1 < c.hidden < 5000], ids=identity)
def test_cpu_path_matches_float64(case, monkeypatch):
    monkeypatch.setattr(
        norm_cases,
        "TOLERANCE",
        {**norm_cases.TOLERANCE, BF16: 5e-3, torch.float16: 8e-4, torch.float32: 2e-6},
    )
    monkeypatch.setattr(
        norm_cases, "vector_tolerance", lambda dtype, rows: 1e-5 if dtype == torch.float32 else 5e-3
    )
    check_forward(cpu, case)
    check_backward(cpu, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "hidden", [1, 3, 7, 64, 100, 500, 640, 768, 1000, 1024, 1100, 3072, 5120, 8192, 12288, 16384]
)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("rms", [False, True])
def test_kernels_match_float64_on_the_wide_sweep(hidden, dtype, rms, monkeypatch):
    if hidden <= 7:
        # Of a handful of elements one rounding may be twice its RMS over many.
        doubled = {dtype: 2 * bound for dtype, bound in norm_cases.TOLERANCE.items()}
        monkeypatch.setattr(norm_cases, "TOLERANCE", doubled)
    programs = launch.backward_shape("norm_backward", hidden, dtype, torch.device(DEVICE)).programs
    for rows in (1, 2, 3, 17, programs - 1, programs, programs + 1):
        for optional in (False, True):
            for dropout_p in (0.0, 0.2):
                case = Case(
                    rows,
                    hidden,
                    dtype,
                    rms=rms,
                    bias=optional,
                    branch_bias=optional,
                    dropout_p=dropout_p,
                )
                check_forward(residual_norm, case)
                check_backward(residual_norm, case)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_scale_zero_leaves_the_stream_and_gives_the_branch_no_gradient(name):
    case = Case(5, 100, BF16, bias=True, branch_bias=True, scale=0.0)
    given = case.inputs()
    y, _, mean, rstd = forward(IMPLEMENTATIONS[name], case, given)
    _, d_branch, vectors = backward(IMPLEMENTATIONS[name], case, given, y, mean, rstd)
    assert torch.equal(y, given["residual"])
    assert (d_branch == 0).all() and (vectors[-1] == 0).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_branch_gradient_is_linear_in_the_scale_and_the_stream_gradient_ignores_it(name):
    case = Case(5, 100, bias=True)
    given = case.inputs()
    y, _, mean, rstd = forward(IMPLEMENTATIONS[name], case, given)
    half, quarter = (
        backward(
            IMPLEMENTATIONS[name], dataclasses.replace(case, scale=scale), given, y, mean, rstd
        )
        for scale in (0.5, 0.25)
    )
    assert torch.equal(half[0], quarter[0])
    assert torch.equal(half[1], 2 * quarter[1])


def test_fused_equals_eager_bitwise_for_a_power_of_two_scale():
    case = Case(17, 768, BF16, scale=0.5)
    given = case.inputs()
    y, *_ = forward(residual_norm, case, given)
    assert torch.equal(y, given["residual"] + 0.5 * given["branch"])


def test_variance_survives_a_mean_a_thousand_times_larger_than_the_deviation():
    x = 1000.0 + torch.randn(3, 768, generator=torch.Generator().manual_seed(1))
    x, weight = x.to(DEVICE), torch.ones(768, device=DEVICE)
    out, _, rstd = residual_norm.norm_forward(x, weight, None, LAYERNORM, torch.float32)
    assert relative_error(rstd, (x.double().var(-1, correction=0) + EPS).rsqrt()) < 1e-5
    assert relative_error(out, reference.norm(x.double(), weight.double(), None, LAYERNORM)) < 1e-4


@pytest.mark.parametrize(
    "case",
    [Case(17, 768, BF16, bias=True, branch_bias=True, dropout_p=0.1), Case(5, 9000)],
    ids=identity,
)
def test_two_runs_agree_bitwise(case):
    given = case.inputs()
    y, out, mean, rstd = forward(residual_norm, case, given)
    runs = [backward(residual_norm, case, given, y, mean, rstd) for _ in range(2)]
    assert torch.equal(out, forward(residual_norm, case, given)[1])
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][2], runs[1][2], strict=True))


@pytest.mark.parametrize("branch_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_add_alone_matches_float64_both_ways(branch_bias, dtype):
    case = Case(7, 768, dtype, branch_bias=branch_bias, dropout_p=0.2)
    given = case.inputs()
    join = Join(0.3, 0.2, given["seed"])
    y = residual_norm.scaled_add_forward(
        given["residual"], given["branch"], given["branch_bias"], join
    )
    assert torch.equal(y, forward(residual_norm, case, given)[0])
    d_branch, partials = residual_norm.scaled_add_backward(given["d_y"], branch_bias, join, dtype)
    factor = reference.dropout_factor(y.shape, norm_cases.on_cpu(join))
    expected = 0.3 * factor * given["d_y"].double().cpu()
    assert relative_error(d_branch, expected) < norm_cases.TOLERANCE[dtype]
    assert partials.shape[1:] == (int(branch_bias), 768)
    if branch_bias:
        assert relative_error(partials[:, 0].double().sum(0), expected.sum(0)) < 1e-5


# Dropout.


def factor_of(seed):
    return reference.dropout_factor(
        torch.Size((500, 101)), Join(1.0, 0.3, kernels.dropout_seed(seed))
    )


def test_dropout_drops_the_asked_share_and_keeps_the_mean():
    factor = factor_of(SEED)
    # Five standard deviations of 50,500 draws.
    assert abs(float((factor == 0).float().mean()) - 0.3) < 0.01
    assert factor.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    other = factor_of(SEED + 1)
    assert 0.5 < float((factor == other).float().mean()) < 0.65  # 0.58 for independent masks
    high = factor_of(SEED + (1 << 40))
    assert not torch.equal(factor, high)


def test_parts_of_a_batch_draw_what_the_whole_batch_draws():
    """Micro-batches, parts of a sequence, and two parts that one rank holds of it."""
    size, sequences, length = 12, 4, 8
    join = Join(1.0, 0.5, kernels.dropout_seed(SEED, batch=sequences, seq_length=length))
    complete = reference.dropout_factor(torch.Size((length, sequences, size)), join)

    def part(positions, **place):
        seed = kernels.dropout_seed(SEED, batch=2, first_sample=2, seq_length=length, **place)
        factor = reference.dropout_factor(torch.Size((positions, 2, size)), Join(1.0, 0.5, seed))
        return factor.view(positions, 2, size)

    assert torch.equal(part(4, start=4), complete[4:, 2:])
    both = part(4, start=2, turn=2, second_start=6)
    assert torch.equal(both[:2], complete[2:4, 2:]) and torch.equal(both[2:], complete[6:, 2:])
    assert not torch.equal(part(4), complete[4:, 2:])  # the control: positions of the rank alone


def test_philox_matches_published_vectors():
    """Known-answer tests of Random123 (philox4x32, 10 rounds)
    with the two counter words that are used here.
    """
    words = reference.philox_4x32(torch.tensor(0), torch.tensor([0]))
    assert [hex(word) for word in words[0].tolist()] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


def test_a_shape_only_pass_draws_nothing_and_changes_no_mask():
    """Tracing and planning run the operations without data; the next real pass must not notice."""
    case = Case(6, 100, dropout_p=0.4)
    given = {key: None if value is None else value.cpu() for key, value in case.inputs().items()}
    arguments = [given[key] for key in ("residual", "branch", "branch_bias", "weight", "bias")]
    join = Join(0.3, 0.4, given["seed"])
    before = kernels.scaled_residual_norm(*arguments, join, LAYERNORM)[0]
    state = torch.get_rng_state()
    shapes = [None if tensor is None else tensor.to("meta") for tensor in arguments]
    y, out = kernels.scaled_residual_norm(*shapes, join.under(given["seed"].to("meta")), LAYERNORM)
    assert y.shape == before.shape and out.is_meta
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(kernels.scaled_residual_norm(*arguments, join, LAYERNORM)[0], before)


def test_a_recomputed_forward_draws_the_same_mask():
    case = Case(6, 100, dropout_p=0.4, branch_bias=True)
    given = case.inputs()
    leaf = given["branch"].cpu().requires_grad_()
    fixed = [
        None if given[k] is None else given[k].cpu()
        for k in ("residual", "branch_bias", "weight", "bias", "seed")
    ]

    def block(branch):
        y, out = kernels.scaled_residual_norm(
            fixed[0], branch, *fixed[1:4], Join(0.3, 0.4, fixed[4]), LAYERNORM
        )
        return (y * out).sum()

    (plain,) = torch.autograd.grad(block(leaf), leaf)
    (recomputed,) = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(block, leaf, use_reentrant=False), leaf
    )
    assert torch.equal(plain, recomputed)


# Addresses beyond 2^31.


VECTOR = torch.ones(1024)
FAR_ROWS = 2**31 // 128  # of 1024 elements, two to a tile; one program takes every tile


def norm_far_away(module):
    x = torch.zeros(64, 1024)
    module.launch_residual_norm_forward(x, x, None, VECTOR, None, Join(0.5), LAYERNORM)
    module.residual_norm_backward_kernel[(1,)](
        x, x, x, x, x, VECTOR, None, x, x, torch.zeros(1, 1, 1024),
        FAR_ROWS, 1024, 1024, 1024, 0.5, 0.0,
        HIDDEN=1024, WIDTHS=(1024,), ROWS=2, RMS=True,
        HAS_BIAS=False, HAS_BRANCH_BIAS=False, STAGES=1,
    )  # fmt: skip


def vectors_far_away(module):
    x = torch.zeros(64, 1024)
    module.norm_vector_gradients_kernel[(1,)](
        x, x, x, x, None, torch.zeros(1, 1, 1024), FAR_ROWS, 1024, 1024,
        HIDDEN=1024, BLOCK=1024, ROWS=2, RMS=True, HAS_BIAS=False, STAGES=1,
    )  # fmt: skip


def add_far_away(module):
    x = torch.zeros(64, 1024)
    module.launch_scaled_add_forward(x, x, None, Join(0.5))
    module.scaled_add_backward_kernel[(1,)](
        x,
        None,
        x,
        torch.zeros(1, 1, 1024),
        FAR_ROWS,
        1024,
        0.5,
        0.0,
        HIDDEN=1024,
        WIDTHS=(1024,),
        ROWS=2,
        STAGES=1,
    )


FAR = {
    "norm": ("ops.residual_norm", norm_far_away),
    "vectors": ("ops.norm_vector_gradients", vectors_far_away),
    "add": ("ops.scaled_add", add_far_away),
}


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's overflow check")
@pytest.mark.parametrize("name", FAR)
def test_addresses_beyond_two_to_the_31_do_not_overflow_and_32_bits_would(name, far_away):
    from triton.runtime.errors import InterpreterError

    module, run = FAR[name]
    run(importlib.import_module(f"megatron_completep.kernels.{module}"))
    with pytest.raises(InterpreterError, match="overflow"):
        run(mutant(module, ".to(tl.int64)", ""))


# Mutants: each slip is caught by the check that is named beside it.

BACKWARD = Case(17, 100, bias=True, branch_bias=True, dropout_p=0.3)
# What goes wrong: (the module, its text, the text instead, the check that notices, its case).
MUTANTS = {
    "the scale is missing in the backward": (
        "tiling", "gradient *= scale", "gradient *= 1.0", check_backward, BACKWARD),
    "statistics are taken before rounding": (
        "tiling", "return stored.to(tl.float32)", "return total + scale * update",
        check_forward, Case(5, 64, BF16)),
    "lanes past the end count in the variance": (
        "ops.residual_norm", "tl.where(column < HIDDEN, x - mean, 0.0)", "x - mean",
        check_forward, Case(5, 100)),
    "the backward drops other elements": (
        "tiling", "gradient *= dropout_factor(seed, dropout_p, number",
        "gradient *= dropout_factor(seed, dropout_p, 1 + number",
        check_backward, BACKWARD),
    "the stream's own gradient is lost": (
        "ops.residual_norm", "if d_y is not None:", "if False:", check_backward, BACKWARD),
    "the mean of the gradient is not removed": (
        "ops.residual_norm", "g[k] - g_mean", "g[k]", check_backward, BACKWARD),
    "a vector gradient takes another's place": (
        "ops.residual_norm", "store_partial(partials, VECTORS - 1, VECTORS, d_branch_bias",
        "store_partial(partials, 1, VECTORS, d_branch_bias",
        check_backward, BACKWARD),
    "later segments are left out of the row's sum": (
        "tiling", "total += tiles[k]", "total += 0.0 * tiles[k]", check_backward, Case(3, 768)),
    "the second segment is left out of the row's sum": (
        "tiling", " + tl.sum(tiles[1], axis=1, keep_dims=True)", "", check_backward, Case(3, 640)),
    "the reduction overwrites the main gradient": (
        "ops.partial_sums", "sums += tl.load(", "sums += 0.0 * tl.load(",
        check_backward, BACKWARD),
}  # fmt: skip


def with_slip(module, old, new):
    """The launchers with one slip in `module`;
    whoever imports the changed module's functions is copied with it.
    """
    broken = mutant(module, old, new)
    changed = {"ops.residual_norm": residual_norm_module, "ops.partial_sums": partial_sums}
    if module == "tiling":
        name = broken.__name__.rpartition(".")[2]
        changed["ops.residual_norm"] = mutant(
            "ops.residual_norm", "from ..tiling", f"from ..{name}"
        )
    else:
        changed[module] = broken
    return launchers(*changed.values())


@pytest.mark.parametrize("slip", MUTANTS)
def test_check_catches_the_mutant_in_which(slip):
    *change, check, case = MUTANTS[slip]
    check(residual_norm, case)
    with pytest.raises(AssertionError, match="relative error"):
        check(with_slip(*change), case)
