"""Cross-entropy over a vocabulary shard: row statistics in one pass, then the gradient over the logits in one more.

Nothing but the logits and one number a row is kept between the passes: the softmax is computed again, 2 bytes read forward, 2 read
and 2 written backward for a bf16 logit. Arithmetic is float32; float64 logits take the definition.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, reference


@triton.jit
def cross_entropy_forward_kernel(
    logits,
    labels,
    stats,  # float32 [3 or 4, tokens]
    tokens,
    columns,
    row_stride,
    vocab_start,
    valid_vocab,
    logit_scale,
    WITH_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    valid = tl.minimum(valid_vocab - vocab_start, columns)
    maximum = -float("inf")
    sum_exp = tl.zeros([BLOCK], dtype=tl.float32)
    sum_z = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, valid, BLOCK):
        column = first + tl.arange(0, BLOCK)
        # Two masks: `columns` is a known multiple of 16, which keeps the loads whole vectors; `valid` may be any number.
        x = tl.load(base + column, mask=column < columns, other=0.0).to(tl.float32) * logit_scale
        z = tl.where(column < valid, x, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(z, 0))
        sum_exp = sum_exp * tl.exp(maximum - new_maximum) + tl.exp(z - new_maximum)
        maximum = new_maximum
        if WITH_SUM:
            sum_z += tl.where(column < valid, x, 0.0)
    tl.store(stats + row, maximum)
    tl.store(stats + row + tokens, tl.sum(sum_exp, 0))
    target = tl.load(labels + row) - vocab_start
    here = (target >= 0) & (target < valid)
    z_target = tl.load(base + target, mask=here, other=0.0).to(tl.float32) * logit_scale
    tl.store(stats + row + tokens + tokens, z_target)
    if WITH_SUM:
        tl.store(stats + row + tokens + tokens + tokens, tl.sum(sum_z, 0))


@triton.jit
def cross_entropy_backward_kernel(
    logits,  # read, then overwritten
    labels,
    lse,
    grad_scale,  # [tokens], or one number
    columns,
    row_stride,
    vocab_start,
    vocab_size,
    ignore_index,
    logit_scale,
    z_loss,
    label_smoothing,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    row_lse = tl.load(lse + row)
    factor = tl.load(grad_scale + (row if PER_TOKEN else 0)).to(tl.float32) * logit_scale
    factor = tl.where(label == ignore_index, 0.0, factor)
    pointer = logits + row * row_stride + column
    x = tl.load(pointer, mask=column < columns, other=0.0).to(tl.float32)
    softmax = tl.exp(x * logit_scale - row_lse)
    wanted = tl.where(column == label - vocab_start, 1.0 - label_smoothing, 0.0) + label_smoothing / vocab_size
    gradient = factor * ((1.0 + 2.0 * z_loss * row_lse) * softmax - wanted)
    # An ignored row is 0 even where its softmax overflows; so is the padding of the vocabulary.
    gradient = tl.where((factor == 0.0) | (column >= vocab_size - vocab_start), 0.0, gradient)
    tl.store(pointer, gradient.to(logits.dtype.element_ty), mask=column < columns)


def cross_entropy_forward(logits: Tensor, labels: Tensor, vocab_start: int, valid_vocab: int, logit_scale: float, with_sum: bool) -> Tensor:
    if logits.dtype == torch.float64:
        return reference.cross_entropy_forward(logits, labels, vocab_start, valid_vocab, logit_scale, with_sum)
    tokens, columns = logits.shape
    stats = torch.empty(4 if with_sum else 3, tokens, dtype=torch.float32, device=logits.device)
    if tokens:
        block, num_warps = launch.block_shape("cross_entropy_forward", logits.device)
        cross_entropy_forward_kernel[(tokens,)](
            logits,
            labels,
            stats,
            tokens,
            columns,
            logits.stride(0),
            vocab_start,
            valid_vocab,
            logit_scale,
            WITH_SUM=with_sum,
            BLOCK=block,
            num_warps=num_warps,
            enable_fp_fusion=True,  # its default depends on the version of Triton
        )
    return stats


def cross_entropy_backward_(
    logits: Tensor,
    labels: Tensor,
    vocab_start: int,
    lse: Tensor,
    grad_scale: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    vocab_size: int,
    logit_scale: float,
) -> None:
    if logits.dtype == torch.float64:
        reference.cross_entropy_backward_(
            logits, labels, vocab_start, lse, grad_scale, ignore_index, z_loss, label_smoothing, vocab_size, logit_scale
        )
        return
    tokens, columns = logits.shape
    if tokens == 0 or columns == 0:
        return
    block, num_warps = launch.block_shape("cross_entropy_backward", logits.device)
    cross_entropy_backward_kernel[(tokens, triton.cdiv(columns, block))](
        logits,
        labels,
        lse,
        grad_scale,
        columns,
        logits.stride(0),
        vocab_start,
        vocab_size,
        ignore_index,
        logit_scale,
        z_loss,
        label_smoothing,
        PER_TOKEN=grad_scale.numel() > 1,
        BLOCK=block,
        num_warps=num_warps,
        enable_fp_fusion=True,  # its default depends on the version of Triton
    )
