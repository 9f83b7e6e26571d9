"""What the kernels that walk over heads share: halves of heads, and the angles of their positions.

A head of D elements is handled as two halves, the pairs (i, i + D/2) of the rotary embedding. In
kernels `column` is [1, HALF], the columns of a half, of which `half` exist.
"""

from torch import Tensor

from .optional_triton import tl, triton


def dense(x: Tensor) -> Tensor:
    """`x`, or a copy whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def angle_strides(cos: Tensor, sin: Tensor) -> tuple[int, int, int, int]:
    """Strides over sequence and batch of cos [S, 1 or B, D/2], then of sin.

    The stride over the batch is 0 where one row of angles serves every sequence.
    """
    cos_stride_b = 0 if cos.shape[1] == 1 else cos.stride(1)
    sin_stride_b = 0 if sin.shape[1] == 1 else sin.stride(1)
    return cos.stride(0), cos_stride_b, sin.stride(0), sin_stride_b


@triton.jit
def load_halves(
    row: tl.tensor, column: tl.tensor, half: tl.tensor, mask: tl.tensor
) -> tl.tuple:  # fmt: skip
    """Both halves of heads in float32, 0 where masked."""
    low = tl.load(row + column, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(row + half + column, mask=mask, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def store_halves(
    row: tl.tensor, low: tl.tensor, high: tl.tensor,
    column: tl.tensor, half: tl.tensor, mask: tl.tensor,
) -> None:  # fmt: skip
    """Both halves of heads, rounded to the tensor's dtype."""
    dtype: tl.constexpr = row.dtype.element_ty
    tl.store(row + column, low.to(dtype), mask=mask)
    tl.store(row + half + column, high.to(dtype), mask=mask)


@triton.jit
def load_angles(
    cos: tl.tensor, sin: tl.tensor, s: tl.tensor, b: tl.tensor,
    cos_stride_s: tl.tensor, cos_stride_b: tl.tensor,
    sin_stride_s: tl.tensor, sin_stride_b: tl.tensor,
    column: tl.tensor, in_half: tl.tensor,
) -> tl.tuple:  # fmt: skip
    """The float32 cosine and sine of position `s` of sequence `b`, each [1, HALF]."""
    cos_row = cos + s * cos_stride_s + b * cos_stride_b
    sin_row = sin + s * sin_stride_s + b * sin_stride_b
    cosine = tl.load(cos_row + column, mask=in_half, other=0.0).to(tl.float32)
    sine = tl.load(sin_row + column, mask=in_half, other=0.0).to(tl.float32)
    return cosine, sine
