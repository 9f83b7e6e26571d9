"""QK-norm and rotation by torch's own operators: the norm, then the rotation.

For CPU tensors, and for float64 tensors of any device. The formulas are in ops/head_norm.py.
"""

import torch
from torch import Tensor

from ..reference import Join, Norm
from .pointwise import rotary
from .residual_norm import norm_forward, residual_norm_backward

_NO_BRANCH = Join()


def head_norm_forward(
    heads: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, q_rstd, k_rstd)."""
    norm = Norm("rmsnorm", eps)
    key_heads = (heads.shape[2] - query_heads) // 2
    q, k, _ = heads.split_with_sizes((query_heads, key_heads, key_heads), dim=2)
    normed_q, _, q_rstd = norm_forward(q, q_gain, None, norm, heads.dtype)
    normed_k, _, k_rstd = norm_forward(k, k_gain, None, norm, heads.dtype)
    return rotary(normed_q, cos, sin, False), rotary(normed_k, cos, sin, False), q_rstd, k_rstd


def head_norm_backward(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, heads: Tensor, q_rstd: Tensor, k_rstd: Tensor,
    q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(d_heads, partials [1, 2, D])."""
    query_heads = d_q.shape[2]
    key_heads = d_k.shape[2]
    q, k, _ = heads.split_with_sizes((query_heads, key_heads, key_heads), dim=2)
    gradients = []
    partials = []
    for d_out, x, rstd, gain in ((d_q, q, q_rstd, q_gain), (d_k, k, k_rstd, k_gain)):
        d_normed = rotary(d_out, cos, sin, True)
        no_mean = rstd.new_empty(0)
        d_x, _, d_gain = residual_norm_backward(
            None, d_normed, x, no_mean, rstd, gain,
            False, False, False, _NO_BRANCH, Norm("rmsnorm"),
        )  # fmt: skip
        gradients.append(d_x)
        partials.append(d_gain)
    return torch.cat((*gradients, d_v), dim=2), torch.cat(partials, dim=1)
