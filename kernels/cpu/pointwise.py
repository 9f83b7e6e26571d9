"""Activations and rotary embedding on CPU tensors (and on float64 tensors of any device), by torch's own operators."""

import torch
from torch import Tensor

from ..reference import compute_dtype

_silu = torch.ops.aten.silu.out
_silu_backward = torch.ops.aten.silu_backward.grad_input


def swiglu_forward(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    d_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    torch.mul(d_out, up, out=d_gate)
    _silu_backward(d_gate, gate, grad_input=d_gate)
    _silu(gate, out=d_up).mul_(d_out)
    return d_gate_up


def squared_relu_forward(x: Tensor) -> Tensor:
    return torch.relu(x).square_()


def squared_relu_backward(d_out: Tensor, x: Tensor) -> Tensor:
    return torch.relu(x).mul_(d_out).mul_(2.0)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    wide = compute_dtype(x)
    cos, sin = cos.to(wide).unsqueeze(2), sin.to(wide).unsqueeze(2)
    out = x.to(wide, copy=True, memory_format=torch.contiguous_format)
    first, second = out.chunk(2, dim=-1)
    sign = -1.0 if inverse else 1.0
    turned = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-sign)
    second.mul_(cos).add_(turned, alpha=sign)
    return out.to(x.dtype)


def rotary_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    x.copy_(rotary(x, cos, sin, inverse))
