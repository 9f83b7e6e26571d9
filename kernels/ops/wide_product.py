"""total += a @ b where the total is wider than the matrices: weight gradients of bf16 matrices in float32, not rounded on the way."""

import functools

import torch
from torch import Tensor


@functools.cache
def adds_exactly(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's GEMM on `device` adds a product of `dtype` into a float32 matrix without rounding it first.

    CUDA can since torch 2.10; other devices and builds refuse. Tried once a process, on a product that 16 bits cannot hold.
    """
    a = torch.full((16, 16), 1.0 + 2.0**-7, dtype=dtype, device=device)
    ones, nothing = (
        torch.ones(16, 16, device=device),
        torch.full((16, 16), torch.nan, device=device),
    )
    product = 16.0 * (1.0 + 2.0**-7) ** 2
    try:
        torch.addmm(ones, a, a, out_dtype=torch.float32, out=ones)
        torch.addmm(nothing, a, a, out_dtype=torch.float32, beta=0.0, out=nothing)
    except (RuntimeError, TypeError):
        return False
    return bool((ones == 1.0 + product).all()) and bool((nothing == product).all())


def add_product(total: Tensor, a: Tensor, b: Tensor, overwrite: bool = False) -> None:
    """`total` [m, n] += `a` [m, k] @ `b` [k, n], or = when `overwrite`; `total` may be float32 and the matrices bf16 or fp16.

    The product is rounded to the matrices' dtype before it is added only where `adds_exactly` says no.
    """
    beta = 0.0 if overwrite else 1.0
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda and not torch.compiler.is_compiling() and adds_exactly(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        # torch.compile knows the product into another dtype, but not the sum (pytorch issue 163880).
        product = (
            torch.mm(a, b, out_dtype=total.dtype)
            if a.is_cuda and torch.compiler.is_compiling()
            else a @ b
        )
        total.copy_(product) if overwrite else total.add_(product)
