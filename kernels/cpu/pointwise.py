"""Activations and rotary embedding by torch's own operators.

For CPU tensors, and for float64 tensors of any device. The formulas are in ops/.
"""

import torch
from torch import Tensor

from ..reference import compute_dtype

_silu = torch.ops.aten.silu.out
_silu_backward = torch.ops.aten.silu_backward.grad_input


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """[..., 2F] -> [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient [..., 2F] of `gate_up`."""
    gate, up = gate_up.chunk(2, dim=-1)
    d_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    # Each half is computed in its own place, without a temporary tensor.
    torch.mul(d_out, up, out=d_gate)
    _silu_backward(d_gate, gate, grad_input=d_gate)
    _silu(gate, out=d_up).mul_(d_out)
    return d_gate_up


def squared_relu_forward(x: Tensor) -> Tensor:
    """`max(x, 0)^2`."""
    return torch.relu(x).square_()


def squared_relu_backward(d_out: Tensor, x: Tensor) -> Tensor:
    """`2 * max(x, 0) * d_out`."""
    return torch.relu(x).mul_(d_out).mul_(2.0)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """`x` [S, B, N, D] rotated; see `ops.rotary.rotary`."""
    math_dtype = compute_dtype(x)
    cos = cos.to(math_dtype).unsqueeze(2)
    sin = sin.to(math_dtype).unsqueeze(2)
    out = x.to(math_dtype, copy=True, memory_format=torch.contiguous_format)
    low, high = out.chunk(2, dim=-1)
    sign = -1.0 if inverse else 1.0
    # The low half is overwritten before the high half reads it.
    low_sin = low * sin
    low.mul_(cos).addcmul_(high, sin, value=-sign)
    high.mul_(cos).add_(low_sin, alpha=sign)
    return out.to(x.dtype)


def join_heads(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient [S, B, N + 2G, D] of fused heads; see `ops.join_heads.join_heads`."""
    # Joined first, so that queries and keys are rotated by one call of each operator.
    d_heads = torch.cat((d_q, d_k, d_v), dim=2)
    rotary_(d_heads[:, :, : d_q.shape[2] + d_k.shape[2]], cos, sin, True)
    return d_heads


def rotary_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """`rotary`, written over `x`."""
    x.copy_(rotary(x, cos, sin, inverse))
