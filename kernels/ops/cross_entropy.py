"""Cross-entropy: the pieces that a vocabulary shard needs, and the whole loss, unembedding included, on one process.

Logits are [T, V_local]: tokens by the columns `vocab_start ...` of the vocabulary; a column whose number is not below the true
vocabulary size is padding, counts as minus infinity and gets gradient 0. `logit_scale` (positive) multiplies the logits as they are
read. Row statistics take one pass, the gradient one more, over the logits themselves.

Nothing but the logits and one number a row is kept between the passes: the softmax is computed again, 2 bytes read forward, 2 read
and 2 written backward for a bf16 logit. Arithmetic is float32; float64 logits take the definition.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..cpu import cross_entropy as cpu
from ..launch import block_shape, options
from ..library import first_derivative, register
from ..optional_triton import tl, triton
from .wide_product import add_product


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
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    valid = tl.minimum(valid_vocab - vocab_start, columns)
    maximum = -float("inf")
    sum_exp = tl.zeros([BLOCK], dtype=tl.float32)
    sum_z = tl.zeros([BLOCK], dtype=tl.float32)
    for first in tl.range(0, valid, BLOCK, num_stages=STAGES):
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
    wanted = (
        tl.where(column == label - vocab_start, 1.0 - label_smoothing, 0.0)
        + label_smoothing / vocab_size
    )
    gradient = factor * ((1.0 + 2.0 * z_loss * row_lse) * softmax - wanted)
    # An ignored row is 0 even where its softmax overflows; so is the padding of the vocabulary.
    gradient = tl.where((factor == 0.0) | (column >= vocab_size - vocab_start), 0.0, gradient)
    tl.store(pointer, gradient.to(logits.dtype.element_ty), mask=column < columns)


def launch_cross_entropy_forward(
    logits: Tensor,
    labels: Tensor,
    vocab_start: int,
    valid_vocab: int,
    logit_scale: float,
    with_sum: bool,
) -> Tensor:
    if logits.dtype == torch.float64:
        return reference.cross_entropy_forward(
            logits, labels, vocab_start, valid_vocab, logit_scale, with_sum
        )
    tokens, columns = logits.shape
    stats = torch.empty(4 if with_sum else 3, tokens, dtype=torch.float32, device=logits.device)
    if tokens:
        shape = block_shape("cross_entropy_forward", logits.dtype, logits.device)
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
            BLOCK=shape.block,
            STAGES=shape.stages,
            **options(shape.num_warps),
        )
    return stats


def launch_cross_entropy_backward_(
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
            logits,
            labels,
            vocab_start,
            lse,
            grad_scale,
            ignore_index,
            z_loss,
            label_smoothing,
            vocab_size,
            logit_scale,
        )
        return
    tokens, columns = logits.shape
    if tokens == 0 or columns == 0:
        return
    shape = block_shape("cross_entropy_backward", logits.dtype, logits.device)
    cross_entropy_backward_kernel[(tokens, triton.cdiv(columns, shape.block))](
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
        BLOCK=shape.block,
        **options(shape.num_warps),
    )


# --- operators --------------------------------------------------------------------------------------------------------------------


def _fake_forward(logits, labels, vocab_start, valid_vocab, logit_scale, with_sum):
    return logits.new_empty(
        (4 if with_sum else 3, logits.shape[0]), dtype=reference.compute_dtype(logits)
    )


_forward = register(
    "cross_entropy_forward(Tensor logits, Tensor labels, int vocab_start, int valid_vocab, float logit_scale, bool with_sum) -> Tensor",
    cpu=cpu.cross_entropy_forward,
    cuda=launch_cross_entropy_forward,
    fake=_fake_forward,
)
_backward = register(
    "cross_entropy_backward_(Tensor(a!) logits, Tensor labels, int vocab_start, Tensor lse, Tensor grad_scale, int ignore_index, "
    "float z_loss, float label_smoothing, int vocab_size, float logit_scale) -> ()",
    cpu=cpu.cross_entropy_backward_,
    cuda=launch_cross_entropy_backward_,
    fake=lambda *_: None,
)


def cross_entropy_forward(
    logits: Tensor,
    labels: Tensor,
    vocab_start: int,
    valid_vocab: int,
    logit_scale: float = 1.0,
    with_sum: bool = False,
) -> Tensor:
    """What one vocabulary shard knows of its rows: stats [3, T], or [4, T] when `with_sum` (label smoothing needs it).

    Rows, of the scaled logits z: max z; sum of exp(z - max z); z at the label, or 0 when the label is not in this shard; sum of z.
    `logits` [T, V_local] bf16, fp16, float32 or float64, last dimension contiguous; `labels` int64 [T], global numbers. float32
    (float64 for float64 logits). Over shards: all-reduce the maximum, then sum row 1 times exp(own - global maximum), and rows 2, 3.
    """
    return _forward(logits, labels, vocab_start, valid_vocab, logit_scale, with_sum)


def cross_entropy_loss(
    stats: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    vocab_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """(loss [T], lse [T]) from the statistics of the whole vocabulary; ignored tokens have loss 0.

    loss = lse - (1 - label_smoothing) * z_label - label_smoothing * mean(z) + z_loss * lse^2
    """
    lse = stats[0] + torch.log(stats[1])
    loss = (
        lse - stats[2]
        if label_smoothing == 0
        else lse - (1 - label_smoothing) * stats[2] - label_smoothing / vocab_size * stats[3]
    )
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss.masked_fill(labels == ignore_index, 0.0), lse


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
    logit_scale: float = 1.0,
) -> None:
    """Write the gradient of the raw (unscaled) logits over them; ignored tokens and padding columns get 0.

        d = logit_scale * grad_scale * ((1 + 2 * z_loss * lse) * softmax(z) - (1 - label_smoothing) * onehot - label_smoothing / V)

    `lse` [T] of the whole vocabulary; `grad_scale` [T] or [1]: the gradient of each token's loss; `vocab_size`: the true V.
    """
    _backward(
        logits,
        labels,
        vocab_start,
        lse,
        grad_scale,
        ignore_index,
        z_loss,
        label_smoothing,
        vocab_size,
        logit_scale,
    )


# --- the whole loss on one process --------------------------------------------------------------------------------------------------

_CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}  # logits held at once


class _UnembeddingCrossEntropy(torch.autograd.Function):
    """The loss is a scalar, so its gradients are known in the forward: each chunk of logits is made, used and dropped once."""

    @staticmethod
    def forward(
        ctx: Any,
        x,
        weight,
        labels,
        logit_scale,
        ignore_index,
        z_loss,
        label_smoothing,
        vocab_size,
        mean,
        chunk,
    ):
        wide = reference.compute_dtype(x)
        kept = (labels != ignore_index).sum().clamp(min=1)
        grad_scale = (
            1.0 / kept.to(wide) if mean else torch.ones((), dtype=wide, device=x.device)
        ).reshape(1)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        d_x = torch.empty_like(x) if needs_x else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=x.device) if needs_weight else None
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for begin in range(0, x.shape[0], chunk):
            tokens = slice(begin, begin + chunk)
            x_chunk, label_chunk = x[tokens], labels[tokens]
            logits = x_chunk @ weight.t()
            stats = _forward(logits, label_chunk, 0, vocab_size, logit_scale, label_smoothing > 0)
            loss, lse = cross_entropy_loss(
                stats, label_chunk, ignore_index, z_loss, label_smoothing, vocab_size
            )
            total += loss.sum(dtype=torch.float64)
            if needs_x or needs_weight:
                _backward(
                    logits,
                    label_chunk,
                    0,
                    lse,
                    grad_scale,
                    ignore_index,
                    z_loss,
                    label_smoothing,
                    vocab_size,
                    logit_scale,
                )
            if d_x is not None:
                torch.mm(logits, weight, out=d_x[tokens])
            if d_weight is not None:
                add_product(d_weight, logits.t(), x_chunk)
        ctx.save_for_backward(d_x, None if d_weight is None else d_weight.to(weight.dtype))
        return (total * grad_scale[0]).to(wide)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, d_loss):
        d_x, d_weight = ctx.saved_tensors
        gradients = [None if d is None else d * d_loss.to(d.dtype) for d in (d_x, d_weight)]
        return *gradients, None, None, None, None, None, None, None, None


def unembedding_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross-entropy of `logit_scale * x @ weight.T` against `labels`, without ever holding all logits; a scalar.

    `x` [..., H], `weight` [V, H] of the same dtype (bf16, float32, float64), `labels` int64 [...], each below `vocab_size` (default V;
    later rows of `weight` are padding) or `ignore_index`. The mean (or sum: `reduction`) over the tokens that are not ignored; the
    mean over none is 0. float32, or float64 for float64 inputs. `chunk_tokens`: tokens whose logits exist at one time (default: a
    function of V and the device). Gradients of `x` and `weight` are computed in the forward and kept: [..., H] and [V, H].
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction = {reduction!r} must be "mean" or "sum".')
    if not logit_scale > 0:
        raise ValueError(f"logit_scale = {logit_scale} must be positive.")
    columns, hidden = weight.shape
    chunk = chunk_tokens or max(1, _CHUNK_ELEMENTS.get(x.device.type, 1 << 27) // columns)
    return _UnembeddingCrossEntropy.apply(
        x.reshape(-1, hidden),
        weight,
        labels.reshape(-1),
        logit_scale,
        ignore_index,
        z_loss,
        label_smoothing,
        columns if vocab_size is None else vocab_size,
        reduction == "mean",
        chunk,
    )
