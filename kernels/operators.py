"""The model's operations as torch sees them: schemas, output shapes, gradients, and the public functions.

Each operation is registered as a forward and a backward operator (`register`, library.py): CPU tensors run native.py, CUDA
tensors the Triton launchers of residual_norm.py, swiglu_kernel.py, squared_relu_kernel.py and rotary_kernel.py. The public functions with
ordinary gradients are `torch.autograd.Function`s over these operators. [..., H] is any leading shape; "rows" its product.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import launch, native
from .library import lazy, register

# --- scaled residual norm: operators ----------------------------------------------------------------------------------------------


def _statistics(x: Tensor, weight: Tensor, rms: bool) -> tuple[Tensor, Tensor]:
    """(mean, rstd) without data: one value a row, no mean for RMSNorm."""
    wide = native.compute_dtype(x, weight)
    rows = x.numel() // x.shape[-1]
    return x.new_empty(0 if rms else rows, dtype=wide), x.new_empty(rows, dtype=wide)


def _fake_norm_forward(x, weight, bias, eps, rms, out_dtype):
    return x.new_empty(x.shape, dtype=out_dtype), *_statistics(x, weight, rms)


def _fake_residual_norm_forward(residual, branch, branch_bias, weight, bias, scale, eps, rms, dropout_p, seed):
    y, out = residual.new_empty(residual.shape), branch.new_empty(branch.shape)
    return y, out, *_statistics(residual, weight, rms)


def _fake_partials(like: Tensor, count: int, wide: torch.dtype) -> Tensor:
    hidden = like.shape[-1]
    return like.new_empty((launch.partial_rows(like.device, like.dtype, hidden), count, hidden), dtype=wide)


def _fake_residual_norm_backward(d_y, d_out, y, mean, rstd, weight, has_branch, has_bias, has_branch_bias, scale, rms, dropout_p, seed):
    d_branch = d_out.new_empty(d_out.shape if has_branch else 0)
    return y.new_empty(y.shape), d_branch, _fake_partials(y, 1 + has_bias + has_branch_bias, rstd.dtype)


def _fake_scaled_add_backward(d_y, has_branch_bias, scale, dropout_p, seed, branch_dtype):
    return d_y.new_empty(d_y.shape, dtype=branch_dtype), _fake_partials(d_y, int(has_branch_bias), native.compute_dtype(d_y))


_norm_forward = register(
    "norm_forward(Tensor x, Tensor weight, Tensor? bias, float eps, bool rms, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    cpu=native.norm_forward,
    cuda=lazy("residual_norm", "norm_forward"),
    fake=_fake_norm_forward,
)
_residual_norm_forward = register(
    "residual_norm_forward(Tensor residual, Tensor branch, Tensor? branch_bias, Tensor weight, Tensor? bias, float scale, "
    "float eps, bool rms, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=native.residual_norm_forward,
    cuda=lazy("residual_norm", "residual_norm_forward"),
    fake=_fake_residual_norm_forward,
)
_residual_norm_backward = register(
    "residual_norm_backward(Tensor? d_y, Tensor d_out, Tensor y, Tensor mean, Tensor rstd, Tensor weight, bool has_branch, "
    "bool has_bias, bool has_branch_bias, float scale, bool rms, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)",
    cpu=native.residual_norm_backward,
    cuda=lazy("residual_norm", "residual_norm_backward"),
    fake=_fake_residual_norm_backward,
)
_reduce_partials = register(
    "reduce_partials_(Tensor partials, int k, Tensor(a!) into) -> ()",
    cpu=native.reduce_partials,
    cuda=lazy("residual_norm", "reduce_partials"),
    fake=lambda partials, k, into: None,
)
_scaled_add_forward = register(
    "scaled_add_forward(Tensor residual, Tensor branch, Tensor? branch_bias, float scale, float dropout_p, Tensor? seed) -> Tensor",
    cpu=native.scaled_add_forward,
    cuda=lazy("residual_norm", "scaled_add_forward"),
    fake=lambda residual, *_: residual.new_empty(residual.shape),
)
_scaled_add_backward = register(
    "scaled_add_backward(Tensor d_y, bool has_branch_bias, float scale, float dropout_p, Tensor? seed, ScalarType branch_dtype) "
    "-> (Tensor, Tensor)",
    cpu=native.scaled_add_backward,
    cuda=lazy("residual_norm", "scaled_add_backward"),
    fake=_fake_scaled_add_backward,
)


# --- scaled residual norm: for callers that schedule their own gradients -----------------------------------------------------------


def residual_norm_forward(
    residual: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    eps: float,
    rms: bool,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, out, mean, rstd) of `y = residual + scale * dropout(branch + branch_bias)`, `out = norm(y) * weight + bias`.

    `residual`, `branch` [..., H]; `branch_bias`, `weight`, `bias` [H]. `y` has the residual's dtype and is rounded before its
    statistics are taken; `out` has the branch's dtype. Without a branch, `y` is `residual` itself and `out` has `out_dtype`
    (default: the residual's). `mean` (empty for RMSNorm) and `rstd` [rows] are float32, or float64 for float64 inputs.
    `seed`: int64 tensor of one element on the same device, needed when `dropout_p` > 0.
    """
    if branch is None:
        return residual, *_norm_forward(residual, weight, bias, eps, rms, out_dtype or residual.dtype)
    return _residual_norm_forward(residual, branch, branch_bias, weight, bias, scale, eps, rms, dropout_p, seed)


def residual_norm_backward(
    d_y: Tensor | None,
    d_out: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    has_branch: bool,
    has_bias: bool,
    has_branch_bias: bool,
    scale: float,
    rms: bool,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(d_residual, d_branch or None, partials) from the gradients of `y` (None: zero) and `out`, and what the forward saved.

    `partials` float32 [P, K, H] holds partial sums of the gradients of weight, then bias, then branch_bias, as far as they
    exist; `reduce_partials` finishes the sum whenever the caller wants it.
    """
    d_residual, d_branch, partials = _residual_norm_backward(
        d_y, d_out, y, mean, rstd, weight, has_branch, has_bias, has_branch_bias, scale, rms, dropout_p, seed
    )
    return d_residual, d_branch if has_branch else None, partials


def reduce_partials(partials: Tensor, k: int, into: Tensor) -> None:
    """Add the sum over P of `partials[:, k]` ([P, K, H]) to `into` [H], in a fixed order (bitwise repeatable)."""
    _reduce_partials(partials, k, into)


def scaled_add_forward(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`residual + scale * dropout(branch + branch_bias)` [..., H] without autograd: the end of a pipeline stage."""
    return _scaled_add_forward(residual, branch, branch_bias, scale, dropout_p, seed)


def scaled_add_backward(
    d_y: Tensor,
    has_branch_bias: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    branch_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(d_branch, partials [P, 1 or 0, H]); the residual's gradient is `d_y` itself."""
    return _scaled_add_backward(d_y, has_branch_bias, scale, dropout_p, seed, branch_dtype or d_y.dtype)


# --- scaled residual norm: ordinary gradients ----------------------------------------------------------------------------------------


def _reduced(partials: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    total = partials.new_zeros(partials.shape[-1])
    _reduce_partials(partials, k, total)
    return total.to(dtype)


class _ScaledResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual, branch, branch_bias, weight, bias, scale, eps, rms, dropout_p, seed):
        y, out, mean, rstd = _residual_norm_forward(residual, branch, branch_bias, weight, bias, scale, eps, rms, dropout_p, seed)
        ctx.save_for_backward(y, mean, rstd, weight, seed)
        ctx.set_materialize_grads(False)
        ctx.settings = (bias is not None, branch_bias is not None, scale, rms, dropout_p)
        ctx.vector_dtypes = (None if bias is None else bias.dtype, None if branch_bias is None else branch_bias.dtype)
        ctx.branch_dtype = branch.dtype
        return y, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y, d_out):
        y, mean, rstd, weight, seed = ctx.saved_tensors
        has_bias, has_branch_bias, scale, rms, dropout_p = ctx.settings
        if d_out is None:
            d_out = torch.zeros(y.shape, dtype=ctx.branch_dtype, device=y.device)
        d_residual, d_branch, partials = _residual_norm_backward(
            d_y, d_out, y, mean, rstd, weight, True, has_bias, has_branch_bias, scale, rms, dropout_p, seed
        )
        d_weight = _reduced(partials, 0, weight.dtype)
        d_bias = _reduced(partials, 1, ctx.vector_dtypes[0]) if has_bias else None
        d_branch_bias = _reduced(partials, 1 + has_bias, ctx.vector_dtypes[1]) if has_branch_bias else None
        return d_residual, d_branch, d_branch_bias, d_weight, d_bias, None, None, None, None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, eps, rms, out_dtype):
        out, mean, rstd = _norm_forward(x, weight, bias, eps, rms, out_dtype)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.rms = rms
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out):
        x, mean, rstd, weight = ctx.saved_tensors
        has_bias = ctx.bias_dtype is not None
        d_x, _, partials = _residual_norm_backward(None, d_out, x, mean, rstd, weight, False, has_bias, False, 1.0, ctx.rms, 0.0, None)
        d_bias = _reduced(partials, 1, ctx.bias_dtype) if has_bias else None
        return d_x, _reduced(partials, 0, weight.dtype), d_bias, None, None, None


class _ScaledAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual, branch, branch_bias, scale, dropout_p, seed):
        ctx.save_for_backward(seed)
        ctx.settings = (branch_bias is not None, scale, dropout_p)
        ctx.branch_dtype = branch.dtype
        ctx.bias_dtype = None if branch_bias is None else branch_bias.dtype
        return _scaled_add_forward(residual, branch, branch_bias, scale, dropout_p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y):
        has_branch_bias, scale, dropout_p = ctx.settings
        d_branch, partials = _scaled_add_backward(d_y, has_branch_bias, scale, dropout_p, ctx.saved_tensors[0], ctx.branch_dtype)
        return d_y, d_branch, _reduced(partials, 0, ctx.bias_dtype) if has_branch_bias else None, None, None, None


def scaled_residual_norm(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    eps: float = 1e-5,
    rms: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, out) with `y = residual + scale * dropout(branch + branch_bias)`, `out = norm(y) * weight + bias`; [..., H] and [H].

    LayerNorm, or RMSNorm when `rms`. Rounding, dtypes and `seed`: see `residual_norm_forward`.
    """
    return _ScaledResidualNorm.apply(residual, branch, branch_bias, weight, bias, scale, eps, rms, dropout_p, seed)


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm, or RMSNorm when `rms`, over the last dimension of [..., H], in `out_dtype` (default: that of `x`)."""
    return _Norm.apply(x, weight, bias, eps, rms, out_dtype or x.dtype)


def scaled_add(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`residual + scale * dropout(branch + branch_bias)` [..., H], in the residual's dtype, rounded once."""
    return _ScaledAdd.apply(residual, branch, branch_bias, scale, dropout_p, seed)


# --- activations and positions -------------------------------------------------------------------------------------------------------

_swiglu_forward = register(
    "swiglu_forward(Tensor gate_up) -> Tensor",
    cpu=native.swiglu_forward,
    cuda=lazy("swiglu_kernel", "swiglu_forward"),
    fake=lambda gate_up: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
)
_swiglu_backward = register(
    "swiglu_backward(Tensor d_out, Tensor gate_up) -> Tensor",
    cpu=native.swiglu_backward,
    cuda=lazy("swiglu_kernel", "swiglu_backward"),
    fake=lambda d_out, gate_up: gate_up.new_empty(gate_up.shape),
)
_squared_relu_forward = register(
    "squared_relu_forward(Tensor x) -> Tensor",
    cpu=native.squared_relu_forward,
    cuda=lazy("squared_relu_kernel", "squared_relu_forward"),
    fake=lambda x: x.new_empty(x.shape),
)
_squared_relu_backward = register(
    "squared_relu_backward(Tensor d_out, Tensor x) -> Tensor",
    cpu=native.squared_relu_backward,
    cuda=lazy("squared_relu_kernel", "squared_relu_backward"),
    fake=lambda d_out, x: x.new_empty(x.shape),
)
_rotary = register(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor",
    cpu=native.rotary,
    cuda=lazy("rotary_kernel", "rotary"),
    fake=lambda x, cos, sin, inverse: x.new_empty(x.shape),
)
_rotary_in_place = register(
    "rotary_(Tensor(a!) x, Tensor cos, Tensor sin, bool inverse) -> ()",
    cpu=native.rotary_,
    cuda=lazy("rotary_kernel", "rotary_"),
    fake=lambda x, cos, sin, inverse: None,
)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up):
        ctx.save_for_backward(gate_up)
        return _swiglu_forward(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out):
        return _swiglu_backward(d_out, ctx.saved_tensors[0])


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x):
        ctx.save_for_backward(x)
        return _squared_relu_forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out):
        return _squared_relu_backward(d_out, ctx.saved_tensors[0])


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, cos, sin, inverse):
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        return _rotary(x, cos, sin, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out):
        cos, sin = ctx.saved_tensors
        return _rotary(d_out, cos, sin, not ctx.inverse), None, None, None


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` for [..., 2F] = [gate | up] -> [..., F]; saves its input."""
    return _SwiGLU.apply(gate_up)


def squared_relu(x: Tensor) -> Tensor:
    """`max(x, 0)^2`, any shape; saves its input."""
    return _SquaredReLU.apply(x)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the pairs (i, i + D/2) of `x` [S, B, N, D] by angles whose `cos`, `sin` are float32 [S, 1 or B, D/2].

    `inverse` rotates back (it is also the gradient). Only the last dimension of `x` must be contiguous; the result is.
    """
    return _Rotary.apply(x, cos, sin, inverse)


def rotary_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    """`rotary` in place, without autograd: for a tensor that nobody saved, such as a view of the fused QKV projection."""
    _rotary_in_place(x, cos, sin, inverse)
