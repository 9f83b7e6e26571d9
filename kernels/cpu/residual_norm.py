"""The scaled add and the norms on CPU tensors (and float64 tensors of any device), by torch's fused operators.

`reference.py` defines the operations; these compute the same values with as few passes over memory as torch allows. Norm
statistics are float32, or float64 for float64 tensors. Partials of the vector gradients have one row ([1, K, H]).
"""

import torch
from torch import Tensor

from ..reference import Join, Norm, compute_dtype, dropout_factor

_layer_norm = torch.ops.aten.native_layer_norm.default
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


def _wide(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if vector is None else vector.to(dtype)


def scaled_add_forward(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    join: Join,
) -> Tensor:
    if branch_bias is not None:
        branch = branch.to(residual.dtype) + branch_bias.to(residual.dtype)
    if join.dropout_seed is not None:
        branch = branch * dropout_factor(branch.shape, join).to(branch.dtype)
    return torch.add(residual, branch, alpha=join.scale).to(residual.dtype)


def scaled_add_backward(
    d_y: Tensor,
    has_branch_bias: bool,
    join: Join,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(d_branch, partials [1, 1 or 0, H])."""
    d_branch = torch.mul(d_y, join.scale).to(branch_dtype)
    if join.dropout_seed is not None:
        d_branch = d_branch.mul_(dropout_factor(d_y.shape, join).to(branch_dtype))
    wide = compute_dtype(d_y)
    hidden = d_y.shape[-1]
    if not has_branch_bias:
        return d_branch, d_y.new_empty((1, 0, hidden), dtype=wide)
    return d_branch, d_branch.view(-1, hidden).sum(0, dtype=wide).view(1, 1, hidden)


def norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [..., H], mean [rows] (empty for RMSNorm), rstd [rows])."""
    hidden = x.shape[-1]
    wide = compute_dtype(x, weight)
    x_2d = x.to(out_dtype) if x.dtype.itemsize < out_dtype.itemsize else x
    x_2d = x_2d.reshape(-1, hidden)
    if norm.rms:
        out, rstd = _rms_norm(x_2d, weight, norm.eps, wide)
        out = out if bias is None else out.add_(bias)
        mean = x.new_empty(0, dtype=wide)
    else:
        # bf16 weights would make torch return bf16 statistics; widened ones cost [H] and keep them in float32.
        out, mean, rstd = _layer_norm(
            x_2d,
            (hidden,),
            weight.to(wide),
            _wide(bias, wide),
            norm.eps,
        )
        mean = mean.view(-1)
    return out.to(out_dtype).view(x.shape), mean, rstd.view(-1)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """In the wide dtype when x is narrow: rstd must not be rounded to bf16, and one wide temporary beats type promotion."""
    x_wide = x.to(wide)
    rstd = (
        torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True)
        .square_()
        .div_(x.shape[-1])
        .add_(eps)
        .rsqrt_()
    )
    normed = torch.mul(x_wide, rstd) if x_wide is x else x_wide.mul_(rstd)
    return normed.mul_(weight.to(wide)).to(x.dtype), rstd


def residual_norm_forward(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    join: Join,
    norm: Norm,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, out, mean, rstd)."""
    y = scaled_add_forward(residual, branch, branch_bias, join)
    return y, *norm_forward(y, weight, bias, norm, branch.dtype)


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
    join: Join,
    norm: Norm,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_residual, d_branch (empty without a branch), partials [1, K, H])."""
    hidden = y.shape[-1]
    wide = compute_dtype(y, weight)
    d_residual, d_weight, d_bias = _norm_backward(
        d_out.reshape(-1, hidden).to(y.dtype),
        y.reshape(-1, hidden),
        mean,
        rstd,
        weight.to(wide),
        has_bias,
        norm.rms,
    )
    d_residual = d_residual.view(y.shape)
    if d_y is not None:
        d_residual.add_(d_y)
    rows = [d_weight.view(1, 1, hidden)]
    if has_bias:
        rows.append(d_bias.view(1, 1, hidden))
    d_branch = d_out.new_empty(0)
    if has_branch:
        d_branch, d_branch_bias = scaled_add_backward(
            d_residual,
            has_branch_bias,
            join,
            d_out.dtype,
        )
        rows.append(d_branch_bias)
    return d_residual, d_branch, torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]


def _norm_backward(
    d_out: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, has_bias: bool, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_y, d_weight, d_bias) of 2-d rows.

    RMSNorm runs as LayerNorm with mean 0, whose gradient is the same less rstd * mean(d_out * weight): that is added back.
    """
    hidden = y.shape[-1]
    rstd = rstd.view(-1, 1)
    mean = torch.zeros_like(rstd) if rms else mean.view(-1, 1)
    d_y, d_weight, d_bias = _layer_norm_backward(
        d_out, y, (hidden,), mean, rstd, weight, weight, (True, True, has_bias)
    )
    if rms:
        correction = torch.mv(d_out, weight.to(d_out.dtype)).to(rstd.dtype).div_(hidden)
        d_y.add_(correction.view(-1, 1).mul_(rstd).to(d_y.dtype))
    return d_y, d_weight, d_bias


def reduce_partials(partials: Tensor, k: int, into: Tensor) -> None:
    into.add_(partials[0, k] if partials.shape[0] == 1 else partials[:, k].sum(0))
