"""The scaled add and the norms by torch's fused operators.

For CPU tensors, and for float64 tensors of any device. `reference.py` defines the operations; these
compute the same values with as few passes over memory as torch allows. Norm statistics are float32,
or float64 for float64 tensors. Partial sums of the vector gradients have one row ([1, K, H]).
"""

import torch
from torch import Tensor

from ..reference import Join, Norm, compute_dtype, dropout_factor

_layer_norm = torch.ops.aten.native_layer_norm.default
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


def scaled_add_forward(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    join: Join,
) -> Tensor:
    """y = residual + scale * dropout(branch + branch_bias), in the residual's dtype."""
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
    math_dtype = compute_dtype(d_y)
    hidden = d_y.shape[-1]
    if not has_branch_bias:
        return d_branch, d_y.new_empty((1, 0, hidden), dtype=math_dtype)
    d_branch_bias = d_branch.view(-1, hidden).sum(0, dtype=math_dtype)
    return d_branch, d_branch_bias.view(1, 1, hidden)


def norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [..., H], mean [rows] (empty for RMSNorm), rstd [rows])."""
    hidden = x.shape[-1]
    math_dtype = compute_dtype(x, weight)
    # torch's operators return the dtype of their input: it must not be narrower than the result's.
    matrix = x.to(out_dtype) if x.dtype.itemsize < out_dtype.itemsize else x
    matrix = matrix.reshape(-1, hidden)
    if norm.rms:
        out, rstd = _rms_norm(matrix, weight, norm.eps, math_dtype)
        if bias is not None:
            out.add_(bias)
        mean = x.new_empty(0, dtype=math_dtype)
    else:
        # With bf16 vectors torch would return bf16 statistics. Float32 ones cost [H] and keep the
        # statistics in float32.
        gain = weight.to(math_dtype)
        offset = None if bias is None else bias.to(math_dtype)
        out, mean, rstd = _layer_norm(matrix, (hidden,), gain, offset, norm.eps)
        mean = mean.view(-1)
    return out.to(out_dtype).view(x.shape), mean, rstd.view(-1)


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, math_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(out, rstd) of rows [rows, H]: `out` in the dtype of `x`, rstd [rows, 1] in `math_dtype`.

    bf16 rows are converted once: rstd must not be rounded to bf16, and one float32 temporary costs
    less than type promotion in every operator.
    """
    converted = x.to(math_dtype)
    length = torch.linalg.vector_norm(converted, dim=-1, keepdim=True)
    mean_square = length.square_().div_(x.shape[-1])
    rstd = mean_square.add_(eps).rsqrt_()
    # `x` belongs to the caller: only a converted copy may be overwritten.
    normed = torch.mul(converted, rstd) if converted is x else converted.mul_(rstd)
    return normed.mul_(weight.to(math_dtype)).to(x.dtype), rstd


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
    gain = weight.to(compute_dtype(y, weight))
    d_out_rows = d_out.reshape(-1, hidden).to(y.dtype)
    y_rows = y.reshape(-1, hidden)
    d_residual, d_weight, d_bias = _norm_backward(
        d_out_rows, y_rows, mean, rstd, gain, has_bias, norm.rms
    )
    d_residual = d_residual.view(y.shape)
    if d_y is not None:
        d_residual.add_(d_y)

    vectors = [d_weight.view(1, 1, hidden)]
    if has_bias:
        vectors.append(d_bias.view(1, 1, hidden))
    d_branch = d_out.new_empty(0)
    if has_branch:
        # The branch receives the whole gradient of y, through the scaled add.
        d_branch, d_branch_bias = scaled_add_backward(
            d_residual, has_branch_bias, join, d_out.dtype
        )
        vectors.append(d_branch_bias)
    partials = torch.cat(vectors, dim=1) if len(vectors) > 1 else vectors[0]
    return d_residual, d_branch, partials


def _norm_backward(
    d_out: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, has_bias: bool, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_y, d_weight, d_bias) of rows [rows, H].

    RMSNorm runs as LayerNorm with mean 0, whose gradient is the same less
    rstd * mean(d_out * weight): that is added back.
    """
    hidden = y.shape[-1]
    # torch's operator takes statistics that broadcast. It does not read the values of the bias, so
    # the weight stands there.
    rstd = rstd.view(-1, 1)
    mean = torch.zeros_like(rstd) if rms else mean.view(-1, 1)
    d_y, d_weight, d_bias = _layer_norm_backward(
        d_out, y, (hidden,), mean, rstd, weight, weight, (True, True, has_bias)
    )
    if rms:
        correction = torch.mv(d_out, weight.to(d_out.dtype)).to(rstd.dtype).div_(hidden)
        d_y.add_(correction.view(-1, 1).mul_(rstd).to(d_y.dtype))
    return d_y, d_weight, d_bias


def reduce_partials(
    partials: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    third: Tensor | None,
    overwrite: int,
) -> None:
    """Add the sums over P of `partials` [P, K, H] to the vectors that are there, each [H].

    overwrite: bit k says that the sum of vector k is written over what is there.
    """
    for k, into in enumerate((first, second, third)):
        if into is None:
            continue
        total = partials[0, k] if partials.shape[0] == 1 else partials[:, k].sum(0)
        into.copy_(total) if overwrite & 1 << k else into.add_(total)
