"""total += a @ b where the total is wider than the matrices.

So weight gradients of bf16 matrices are added up in float32 and not rounded on the way.
"""

import functools

import torch
from torch import Tensor


@functools.cache
def adds_exactly(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's GEMM adds a product of `dtype` into a float32 matrix without rounding it.

    CUDA can since torch 2.10; other devices and builds refuse. It is tried once a process and
    device, on a product that 16 bits cannot hold.
    """
    a = torch.full((16, 16), 1.0 + 2.0**-7, dtype=dtype, device=device)
    product = 16.0 * (1.0 + 2.0**-7) ** 2
    added = torch.ones(16, 16, device=device)
    # With beta = 0 what is there must not be read: 0 * NaN would be NaN.
    overwritten = torch.full((16, 16), torch.nan, device=device)
    try:
        torch.addmm(added, a, a, out_dtype=torch.float32, out=added)
        torch.addmm(overwritten, a, a, out_dtype=torch.float32, beta=0.0, out=overwritten)
    except (RuntimeError, TypeError):
        return False
    return bool((added == 1.0 + product).all()) and bool((overwritten == product).all())


def add_product(total: Tensor, a: Tensor, b: Tensor, overwrite: bool = False) -> None:
    """`total` [m, n] += `a` [m, k] @ `b` [k, n], or = when `overwrite`.

    `total` may be float32 and the matrices bf16 or fp16. The product is rounded to the matrices'
    dtype before it is added only where `adds_exactly` says no.
    """
    beta = 0.0 if overwrite else 1.0
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
        return

    if a.is_cuda and torch.compiler.is_compiling():
        # torch.compile knows the product into another dtype, not the sum (pytorch issue 163880).
        product = torch.mm(a, b, out_dtype=total.dtype)
    elif a.is_cuda and adds_exactly(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
        return
    else:
        product = a @ b
    if overwrite:
        total.copy_(product)
    else:
        total.add_(product)
