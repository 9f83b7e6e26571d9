"""Inputs of the residual norm, its float64 answer,
and the checks that the kernels (and, by failing, their mutants) are put to.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch

from megatron_completep.kernels import Join, Norm, reference
from tests.kernels.step_kernels import DEVICE

# ||a - b|| / ||b|| that one rounding to the dtype, and float32 arithmetic before it, explain.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3, torch.float16: 5e-4, torch.float64: 1e-13}
SCALE, EPS = 0.3, 1e-5
SEED = 0x1234_5678_9ABC
# Two parts of longer sequences, two sequences side by side.
PLACE = {"batch": 2, "first_sample": 5, "seq_length": 64, "start": 8, "turn": 3, "second_start": 40}


def relative_error(found, expected):
    difference = (found.double().cpu() - expected.double().cpu()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30)) if found.numel() else 0.0


def assert_close(found, expected, tolerance, what):
    assert found.shape == expected.shape, (
        f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    )
    error = relative_error(found, expected)
    # NaN fails too
    assert error <= tolerance, f"{what}: relative error {error:.2e} is over {tolerance:.2e}"


def vector_tolerance(dtype, rows):
    """Sums over rows accumulate in float32 whatever the dtype of the rows."""
    return 1e-12 if dtype == torch.float64 else 1e-5 * math.sqrt(max(rows, 1024) / 1024)


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int
    hidden: int
    dtype: torch.dtype = torch.float32
    rms: bool = False
    branch: bool = True
    bias: bool = False
    branch_bias: bool = False
    dropout_p: float = 0.0
    residual_dtype: torch.dtype | None = None
    stride: int = 0  # extra elements between rows
    d_y: bool = True
    scale: float = SCALE

    @property
    def norm(self) -> Norm:
        return Norm("rmsnorm" if self.rms else "layernorm", EPS)

    def join(self, given: dict[str, Any]) -> Join:
        return Join(self.scale, self.dropout_p, given["seed"])

    def inputs(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.rows * 100_003 + self.hidden)

        def rows(dtype):
            wide = torch.randn(
                self.rows, self.hidden + self.stride, generator=generator, dtype=torch.float64
            )
            return wide.to(dtype).to(DEVICE)[:, : self.hidden]

        def vector(present, offset=0.0):
            values = torch.randn(self.hidden, generator=generator, dtype=torch.float64) + offset
            return values.to(self.dtype).to(DEVICE) if present else None

        stream = self.residual_dtype or self.dtype
        seed = reference.dropout_seed(SEED, **PLACE, device=DEVICE)
        return {
            "residual": rows(stream),
            "branch": rows(self.dtype),
            "branch_bias": vector(self.branch_bias),
            "weight": vector(True, 1.0),
            "bias": vector(self.bias),
            "d_y": rows(stream) if self.d_y else None,
            "d_out": rows(self.dtype),
            "seed": seed if self.dropout_p else None,
        }


def forward(implementation, case, given):
    """(y, out, mean, rstd), whichever halves the case has."""
    if not case.branch:
        alone = (given["residual"], given["weight"], given["bias"], case.norm, case.dtype)
        return given["residual"], *implementation.norm_forward(*alone)
    vectors = (given["branch_bias"], given["weight"], given["bias"])
    return implementation.residual_norm_forward(
        given["residual"], given["branch"], *vectors, case.join(given), case.norm
    )


def backward(implementation, case, given, y, mean, rstd):
    """(d_residual, d_branch, [d_weight, d_bias, d_branch_bias] as far as they exist),
    reduced into buffers that hold 1.
    """
    d_residual, d_branch, partials = implementation.residual_norm_backward(
        given["d_y"], given["d_out"], y, mean, rstd, given["weight"],
        case.branch, case.bias, case.branch_bias, case.join(given), case.norm,
    )  # fmt: skip
    ones = torch.ones(partials.shape[1], case.hidden, dtype=partials.dtype, device=DEVICE)
    vectors = list(ones.unbind())
    absent = [None] * (3 - len(vectors))
    implementation.reduce_partials(partials, *vectors, *absent, 0)
    return d_residual, d_branch, [v.double() - 1.0 for v in vectors]


def wide(tensor):
    return None if tensor is None else tensor.double().cpu()


def check_forward(implementation, case, allocations=contextlib.nullcontext()):  # noqa: B008 (it has no state)
    """Each half against float64 on the same rounded inputs;
    statistics and `out` are those of the stored y.
    """
    given = case.inputs()
    with allocations:
        y, out, mean, rstd = forward(implementation, case, given)
    if case.branch:
        summands = (wide(given["residual"]), wide(given["branch"]), wide(given["branch_bias"]))
        added = reference.scaled_add(*summands, on_cpu(case.join(given)))
        assert y.dtype == given["residual"].dtype
        assert_close(y, added, TOLERANCE[y.dtype], "y")
    stored = wide(y)
    assert out.dtype == case.dtype
    assert rstd.shape == (case.rows,)
    assert mean.shape == (0 if case.rms else case.rows,)
    normed = reference.norm(stored, wide(given["weight"]), wide(given["bias"]), case.norm)
    assert_close(out, normed, TOLERANCE[case.dtype], "out")
    if not case.rms:
        assert_close(
            mean, stored.mean(-1), 1e-6 * max(1.0, math.sqrt(case.hidden)), "mean of the stored y"
        )
    centred = stored if case.rms else stored - stored.mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    assert_close(rstd, (variance + EPS).rsqrt(), 2e-6, "rstd")


def on_cpu(join):
    return join if join.seed is None else join.under(join.seed.cpu())


def expected_gradients(case, given, y):
    """The gradients by autograd in float64, from the y that was stored."""
    leaves = [wide(y), wide(given["weight"]), wide(given["bias"])]
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_()
    out = reference.norm(leaves[0], leaves[1], leaves[2], case.norm)
    total = (out * wide(given["d_out"])).sum()
    if given["d_y"] is not None:
        total = total + (leaves[0] * wide(given["d_y"])).sum()
    d_residual, *vectors = torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None])
    d_branch = case.scale * d_residual
    if case.dropout_p:
        d_branch = d_branch * reference.dropout_factor(d_branch.shape, on_cpu(case.join(given)))
    if case.branch_bias:
        vectors.append(d_branch.sum(0))
    return d_residual, d_branch, vectors


def cancellation(case, given, y, d_residual):
    """The relative error of four float32 roundings of the terms whose sum is `d_residual`.

    Rows of three elements leave LayerNorm's gradient one dimension: what cancels may be larger than
    what stays. All other widths are held to `TOLERANCE` alone.
    """
    if case.hidden != 3:
        return 0.0
    stored = wide(y)
    centred = stored if case.rms else stored - stored.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
    x_hat = centred * rstd
    g = wide(given["d_out"]) * wide(given["weight"])
    mean = 0.0 if case.rms else g.mean(-1, keepdim=True).abs()
    terms = rstd * (g.abs() + mean + (x_hat * (g * x_hat).mean(-1, keepdim=True)).abs())
    return 2**-22 * float(terms.norm() / d_residual.norm())


def check_backward(implementation, case, allocations=contextlib.nullcontext()):  # noqa: B008
    given = case.inputs()
    y, _, mean, rstd = forward(implementation, case, given)
    with allocations:
        d_residual, d_branch, vectors = backward(implementation, case, given, y, mean, rstd)
    expected_residual, expected_branch, expected_vectors = expected_gradients(case, given, y)
    assert d_residual.dtype == y.dtype
    cancelled = cancellation(case, given, y, expected_residual)
    assert_close(d_residual, expected_residual, max(TOLERANCE[y.dtype], cancelled), "d_residual")
    if case.branch:
        assert d_branch.dtype == case.dtype
        assert_close(d_branch, expected_branch, max(TOLERANCE[case.dtype], cancelled), "d_branch")
    assert len(vectors) == len(expected_vectors)
    # Beyond the registers the branch bias sums the stored branch gradient, rounded to its dtype.
    rounded = case.branch_bias and case.hidden > 8192
    for name, found, expected in zip(
        ("d_weight", "d_bias", "d_branch_bias"), vectors, expected_vectors, strict=False
    ):
        tolerance = (
            TOLERANCE[case.dtype] if rounded else 2 * vector_tolerance(case.dtype, case.rows)
        )
        if name == "d_branch_bias" and case.hidden <= 7:
            # The sums of so few columns may all but vanish: four roundings of what they add up.
            added = expected_branch.abs().sum(0).norm()
            tolerance = max(tolerance, 2**-22 * float(added / expected.norm()))
        assert_close(found, expected, tolerance, name)


GUARD = 256  # elements on either side of every buffer, so that 128-bit alignment stays


@contextlib.contextmanager
def poisoned_allocations(monkeypatch) -> Iterator[None]:
    """New tensors start as NaN between two guard bands, which must be untouched at the end."""
    true_empty, buffers, calls = torch.empty, [], []

    def empty(*shape, dtype=None, device=None, **_):
        size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        calls.append(size)
        if size.numel() == 0 or (dtype is not None and not dtype.is_floating_point):
            return true_empty(size, dtype=dtype, device=device)
        buffer = true_empty(
            size.numel() + 2 * GUARD, dtype=dtype or torch.float32, device=device
        ).fill_(math.nan)
        buffers.append(buffer)
        return buffer[GUARD : GUARD + size.numel()].view(size)

    def new_empty(self, *shape, dtype=None, device=None, **_):
        return empty(*shape, dtype=dtype or self.dtype, device=device or self.device)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", lambda x, **_: new_empty(x, x.shape))
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        yield
    assert calls, "nothing was allocated through the patched functions"
    for buffer in buffers:
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all(), (
            "a kernel wrote outside its output"
        )
