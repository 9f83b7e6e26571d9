"""SwiGLU over the fused projection: [..., 2F] = [gate | up] -> silu(gate) * up [..., F].

    d_up = d_out * silu(gate)          silu(g) = g * sigmoid(g)
    d_gate = d_out * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))

Arithmetic is float32, rounded once; the backward writes both halves of one [..., 2F] gradient. Rows
may be strided.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cpu import pointwise as cpu
from ..cpu.compiled import CompiledDefinitions, server_of
from ..launch import pointwise_shape
from ..library import first_derivative, register
from ..optional_triton import tl, triton
from ..tiling import ceil_div, rows_of


@triton.jit
def swiglu_forward_kernel(
    gate_up: tl.tensor,  # [rows, 2F]
    out: tl.tensor,  # [rows, F], contiguous
    rows: tl.tensor,
    stride: tl.tensor,  # between the rows of gate_up, in elements
    F: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Each program computes one tile of [rows, F]."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS)[:, None]
    first_column = tl.program_id(1) * BLOCK
    column = first_column + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < F)
    gate_address = gate_up + row * stride + column
    gate = tl.load(gate_address, mask=mask, other=0.0).to(tl.float32)
    up_address = gate_up + row * stride + F + column
    up = tl.load(up_address, mask=mask, other=0.0).to(tl.float32)

    address = out + row * F + column
    product = gate * tl.sigmoid(gate) * up
    tl.store(address, product.to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(
    d_out: tl.tensor,  # [rows, F]
    gate_up: tl.tensor,  # [rows, 2F]
    d_gate_up: tl.tensor,  # [rows, 2F], contiguous
    rows: tl.tensor,
    d_out_stride: tl.tensor,  # between rows, in elements
    stride: tl.tensor,  # the same of gate_up
    F: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Each program computes the gradients of gate and up for one tile of [rows, F]."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS)[:, None]
    first_column = tl.program_id(1) * BLOCK
    column = first_column + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < F)
    gate_address = gate_up + row * stride + column
    gate = tl.load(gate_address, mask=mask, other=0.0).to(tl.float32)
    up_address = gate_up + row * stride + F + column
    up = tl.load(up_address, mask=mask, other=0.0).to(tl.float32)
    d_out_address = d_out + row * d_out_stride + column
    gradient = tl.load(d_out_address, mask=mask, other=0.0).to(tl.float32)

    # The sigmoid is computed again: nothing but the input is kept between forward and backward.
    sigmoid = tl.sigmoid(gate)
    d_gate = gradient * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    d_up = gradient * gate * sigmoid
    dtype = d_gate_up.dtype.element_ty
    address = d_gate_up + row * (2 * F) + column
    tl.store(address, d_gate.to(dtype), mask=mask)
    tl.store(address + F, d_up.to(dtype), mask=mask)


def launch_swiglu_forward(gate_up: Tensor) -> Tensor:
    """[..., 2F] -> [..., F]."""
    if gate_up.dtype == torch.float64:
        return cpu.swiglu_forward(gate_up)
    half = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], half))
    if out.numel() > 0:
        gate_up, stride = rows_of(gate_up)
        rows = out.numel() // half
        shape = pointwise_shape("swiglu_forward", half, out.dtype, out.device)
        grid = (ceil_div(rows, shape.rows), ceil_div(half, shape.columns))
        swiglu_forward_kernel[grid](
            gate_up,
            out,
            rows,
            stride,
            half,
            ROWS=shape.rows,
            BLOCK=shape.columns,
            **shape.options,
        )
    return out


def launch_swiglu_backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient [..., 2F] of `gate_up`, contiguous."""
    if gate_up.dtype == torch.float64:
        return cpu.swiglu_backward(d_out, gate_up)
    half = d_out.shape[-1]
    d_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    if d_out.numel() > 0:
        rows = d_out.numel() // half
        d_out, d_out_stride = rows_of(d_out)
        gate_up, stride = rows_of(gate_up)
        shape = pointwise_shape("swiglu_backward", half, d_out.dtype, d_out.device)
        grid = (ceil_div(rows, shape.rows), ceil_div(half, shape.columns))
        swiglu_backward_kernel[grid](
            d_out,
            gate_up,
            d_gate_up,
            rows,
            d_out_stride,
            stride,
            half,
            ROWS=shape.rows,
            BLOCK=shape.columns,
            **shape.options,
        )
    return d_gate_up


def _fake_forward(gate_up: Tensor) -> Tensor:
    half = gate_up.shape[-1] // 2
    return gate_up.new_empty((*gate_up.shape[:-1], half))


_swiglu_forward = register(
    "swiglu_forward(Tensor gate_up) -> Tensor",
    cpu=cpu.swiglu_forward,
    cuda=launch_swiglu_forward,
    fake=_fake_forward,
)
_swiglu_backward = register(
    "swiglu_backward(Tensor d_out, Tensor gate_up) -> Tensor",
    cpu=cpu.swiglu_backward,
    cuda=launch_swiglu_backward,
    fake=lambda d_out, gate_up: gate_up.new_empty(gate_up.shape),
)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, compiled: CompiledDefinitions | None) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.compiled = compiled
        forward = compiled.swiglu_forward if compiled else _swiglu_forward
        return forward(gate_up)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        backward = ctx.compiled.swiglu_backward if ctx.compiled else _swiglu_backward
        return backward(d_out, ctx.saved_tensors[0]), None


_swiglu: Callable[[Tensor, CompiledDefinitions | None], Tensor] = _SwiGLU.apply


def swiglu(gate_up: Tensor, compiled: CompiledDefinitions | None = None) -> Tensor:
    """`silu(gate) * up` for [..., 2F] = [gate | up] -> [..., F]; saves its input.

    compiled: what runs in place of the operator on the tensors that it serves.
    """
    return _swiglu(gate_up, server_of(gate_up, compiled))
