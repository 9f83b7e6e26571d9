"""Cross-entropy of one vocabulary shard, and the loss with its unembedding on one process.

Logits are [T, V_local]: tokens by the columns `vocab_start ...` of the vocabulary. A column whose
number is not below the true vocabulary size is padding: it counts as minus infinity and gets
gradient 0. `logit_scale` (positive) multiplies the logits as they are read. Row statistics take one
pass, the gradient one more, over the logits themselves.

Nothing but the logits and one number a row is kept between the passes: the softmax is computed
again. A bf16 logit costs 2 bytes read forward, 2 read and 2 written backward. Arithmetic is
float32; float64 logits take the definition.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..cpu import cross_entropy as cpu
from ..cpu.compiled import CompiledDefinitions, server_of
from ..launch import block_shape, options
from ..library import first_derivative, register
from ..optional_triton import tl, triton
from ..tiling import ceil_div
from .wide_product import add_product


@triton.jit
def cross_entropy_forward_kernel(
    logits: tl.tensor,
    labels: tl.tensor,
    stats: tl.tensor,  # float32 [3 or 4, tokens]
    tokens: tl.tensor,
    columns: tl.tensor,
    row_stride: tl.tensor,
    vocab_start: tl.tensor,
    vocab_size: tl.tensor,  # the true vocabulary size
    logit_scale: tl.tensor,
    WITH_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Each program reads one row, a block of columns at a time."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    valid = tl.minimum(vocab_size - vocab_start, columns)
    maximum = -float("inf")
    sum_exp = tl.zeros([BLOCK], dtype=tl.float32)
    sum_z = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.range(0, valid, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        # Two masks: `columns` is a known multiple of 16, so that the loads are full vectors, and
        # `valid` may be any number.
        loaded = tl.load(base + column, mask=column < columns, other=0.0)
        x = loaded.to(tl.float32) * logit_scale
        z = tl.where(column < valid, x, -float("inf"))
        # The sum so far is rescaled to the new maximum. It stays one number a column of the block
        # until the end, where they are added up once.
        new_maximum = tl.maximum(maximum, tl.max(z, 0))
        rescaled = sum_exp * tl.exp(maximum - new_maximum)
        sum_exp = rescaled + tl.exp(z - new_maximum)
        maximum = new_maximum
        if WITH_SUM:
            sum_z += tl.where(column < valid, x, 0.0)

    address = stats + row
    tl.store(address, maximum)
    tl.store(address + tokens, tl.sum(sum_exp, 0))
    target = tl.load(labels + row) - vocab_start
    in_shard = (target >= 0) & (target < valid)
    loaded_target = tl.load(base + target, mask=in_shard, other=0.0)
    z_target = loaded_target.to(tl.float32) * logit_scale
    tl.store(address + tokens + tokens, z_target)
    if WITH_SUM:
        tl.store(address + tokens + tokens + tokens, tl.sum(sum_z, 0))


@triton.jit
def cross_entropy_backward_kernel(
    logits: tl.tensor,  # read, then overwritten
    labels: tl.tensor,
    lse: tl.tensor,
    grad_scale: tl.tensor,  # [tokens], or one number
    columns: tl.tensor,
    row_stride: tl.tensor,
    vocab_start: tl.tensor,
    vocab_size: tl.tensor,
    ignore_index: tl.tensor,
    logit_scale: tl.tensor,
    z_loss: tl.tensor,
    label_smoothing: tl.tensor,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Each program computes one block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    first_column = tl.program_id(1) * BLOCK
    column = first_column + tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    row_lse = tl.load(lse + row)
    factor = tl.load(grad_scale + (row if PER_TOKEN else 0)).to(tl.float32) * logit_scale
    factor = tl.where(label == ignore_index, 0.0, factor)
    pointer = logits + row * row_stride + column
    in_row = column < columns
    x = tl.load(pointer, mask=in_row, other=0.0).to(tl.float32)
    # The lse is that of the whole vocabulary, so the shards do not communicate again.
    softmax = tl.exp(x * logit_scale - row_lse)
    smoothed_target = tl.where(column == label - vocab_start, 1.0 - label_smoothing, 0.0)
    smoothed_target += label_smoothing / vocab_size
    # The z-loss z_loss * lse^2 adds 2 * z_loss * lse * softmax.
    difference = (1.0 + 2.0 * z_loss * row_lse) * softmax - smoothed_target
    gradient = factor * difference

    # An ignored row is 0 even where its softmax overflows; so is the padding of the vocabulary.
    is_zero = (factor == 0.0) | (column >= vocab_size - vocab_start)
    gradient = tl.where(is_zero, 0.0, gradient)
    tl.store(pointer, gradient.to(logits.dtype.element_ty), mask=in_row)


def launch_cross_entropy_forward(
    logits: Tensor,
    labels: Tensor,
    vocab_start: int,
    vocab_size: int,
    logit_scale: float,
    with_sum: bool,
) -> Tensor:
    """Row statistics [3 or 4, T]; one program a row."""
    if logits.dtype == torch.float64:
        return reference.cross_entropy_forward(
            logits, labels, vocab_start, vocab_size, logit_scale, with_sum
        )
    tokens, columns = logits.shape
    stats = torch.empty(4 if with_sum else 3, tokens, dtype=torch.float32, device=logits.device)
    if tokens:
        shape = block_shape("cross_entropy_forward", logits.dtype, logits.device)
        grid = (tokens,)
        cross_entropy_forward_kernel[grid](
            logits,
            labels,
            stats,
            tokens,
            columns,
            logits.stride(0),
            vocab_start,
            vocab_size,
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
    """The gradient, written over the logits; one program a block of columns of a row."""
    if logits.dtype == torch.float64:
        terms = (ignore_index, z_loss, label_smoothing, vocab_size, logit_scale)
        reference.cross_entropy_backward_(logits, labels, vocab_start, lse, grad_scale, *terms)
        return
    tokens, columns = logits.shape
    if tokens == 0 or columns == 0:
        return
    shape = block_shape("cross_entropy_backward", logits.dtype, logits.device)
    grid = (tokens, ceil_div(columns, shape.block))
    cross_entropy_backward_kernel[grid](
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


def _fake_forward(
    logits: Tensor,
    labels: Tensor,
    vocab_start: int,
    vocab_size: int,
    logit_scale: float,
    with_sum: bool,
) -> Tensor:
    shape = (4 if with_sum else 3, logits.shape[0])
    return logits.new_empty(shape, dtype=reference.compute_dtype(logits))


_forward = register(
    "cross_entropy_forward(Tensor logits, Tensor labels, int vocab_start, int vocab_size, "
    "float logit_scale, bool with_sum) -> Tensor",
    cpu=cpu.cross_entropy_forward,
    cuda=launch_cross_entropy_forward,
    fake=_fake_forward,
)
_backward = register(
    "cross_entropy_backward_(Tensor(a!) logits, Tensor labels, int vocab_start, Tensor lse, "
    "Tensor grad_scale, int ignore_index, float z_loss, float label_smoothing, int vocab_size, "
    "float logit_scale) -> ()",
    cpu=cpu.cross_entropy_backward_,
    cuda=launch_cross_entropy_backward_,
    fake=lambda *_: None,
)


def cross_entropy_forward(
    logits: Tensor,
    labels: Tensor,
    vocab_start: int,
    vocab_size: int,
    logit_scale: float = 1.0,
    with_sum: bool = False,
    compiled: CompiledDefinitions | None = None,
) -> Tensor:
    """Row statistics of one vocabulary shard: [3, T], or [4, T] with `with_sum`.

    The rows are, of the scaled logits z: max z; sum of exp(z - max z); z at the label, or 0 when
    the label is not in this shard; sum of z, which label smoothing needs. They are float32, or
    float64 for float64 logits. `logits` [T, V_local] are bf16, fp16, float32 or float64, with
    contiguous rows; `labels` int64 [T] are numbers of the whole vocabulary.

    There is no communication. Over shards, all-reduce the maximum; then sum row 1, each shard's
    multiplied by exp(its maximum - the maximum of all), and rows 2 and 3 as they are.

    compiled: what computes it on a CPU, if it serves these logits.
    """
    server = server_of(logits, compiled)
    if server is not None and logits.numel():
        return server.cross_entropy_forward(
            logits, labels, vocab_start, vocab_size, logit_scale, with_sum
        )
    return _forward(logits, labels, vocab_start, vocab_size, logit_scale, with_sum)


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
    if label_smoothing == 0:
        loss = lse - stats[2]
    else:
        mean_weight = label_smoothing / vocab_size
        loss = lse - (1 - label_smoothing) * stats[2] - mean_weight * stats[3]
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
    compiled: CompiledDefinitions | None = None,
) -> None:
    """Write the gradient of the raw (unscaled) logits over them.

        d = logit_scale * grad_scale * ((1 + 2 * z_loss * lse) * softmax(z) - target)
        target = (1 - label_smoothing) * onehot + label_smoothing / V

    Ignored tokens and padding columns get 0. `lse` [T] is that of the whole vocabulary;
    `grad_scale` [T] or [1] is the gradient of each token's loss; `vocab_size` is the true V.
    compiled: as above.
    """
    server = server_of(logits, compiled)
    terms = (ignore_index, z_loss, label_smoothing, vocab_size, logit_scale)
    if server is not None and logits.numel():
        server.cross_entropy_backward_(logits, labels, vocab_start, lse, grad_scale, *terms)
        return
    _backward(logits, labels, vocab_start, lse, grad_scale, *terms)


_CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}  # logits held at once


class _UnembeddingCrossEntropy(torch.autograd.Function):
    """The loss is a scalar, so its gradients are known in the forward, up to one factor.

    Each chunk of logits is made, used and dropped once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        logit_scale: float,
        ignore_index: int,
        z_loss: float,
        label_smoothing: float,
        vocab_size: int,
        mean: bool,
        chunk: int,
    ) -> Tensor:
        math_dtype = reference.compute_dtype(x)
        if mean:
            # The mean over no tokens is 0, not NaN.
            counted = (labels != ignore_index).sum().clamp(min=1)
            grad_scale = (1.0 / counted.to(math_dtype)).reshape(1)
        else:
            grad_scale = torch.ones(1, dtype=math_dtype, device=x.device)

        needs_x, needs_weight = ctx.needs_input_grad[:2]
        d_x = torch.empty_like(x) if needs_x else None
        d_weight = None
        if needs_weight:
            d_weight = torch.zeros(weight.shape, dtype=math_dtype, device=x.device)

        total = torch.zeros((), dtype=torch.float64, device=x.device)
        loss_terms = (ignore_index, z_loss, label_smoothing, vocab_size)
        for begin in range(0, x.shape[0], chunk):
            tokens = slice(begin, begin + chunk)
            x_chunk = x[tokens]
            label_chunk = labels[tokens]
            logits = x_chunk @ weight.t()
            stats = _forward(logits, label_chunk, 0, vocab_size, logit_scale, label_smoothing > 0)
            loss, lse = cross_entropy_loss(stats, label_chunk, *loss_terms)
            total += loss.sum(dtype=torch.float64)

            # From here on the logits are their own gradient.
            if needs_x or needs_weight:
                _backward(logits, label_chunk, 0, lse, grad_scale, *loss_terms, logit_scale)
            if d_x is not None:
                torch.mm(logits, weight, out=d_x[tokens])
            if d_weight is not None:
                add_product(d_weight, logits.t(), x_chunk)
        ctx.save_for_backward(d_x, None if d_weight is None else d_weight.to(weight.dtype))
        return (total * grad_scale[0]).to(math_dtype)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = []
        for gradient in ctx.saved_tensors:
            scaled = None if gradient is None else gradient * d_loss.to(gradient.dtype)
            gradients.append(scaled)
        return *gradients, None, None, None, None, None, None, None, None


_unembedding_cross_entropy: Callable[..., Tensor] = _UnembeddingCrossEntropy.apply


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
    """Cross-entropy of `logit_scale * x @ weight.T` against `labels`: a scalar.

    The logits are never all there at once. `x` [..., H] and `weight` [V, H] have the same dtype:
    bf16, float32 or float64. `labels` int64 [...] are each below `vocab_size` (default V; later
    rows of `weight` are padding) or `ignore_index`. The loss is the mean or the sum (`reduction`)
    over the tokens that are not ignored; the mean over none is 0. It is float32, or float64 for
    float64 inputs. `chunk_tokens`: tokens whose logits exist at one time (default: a function of V
    and the device). Gradients of `x` and `weight` are computed in the forward and kept: [..., H]
    and [V, H].

    Raises ValueError for another `reduction`, and for a `logit_scale` that is not positive.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction = {reduction!r} must be "mean" or "sum".')
    if not logit_scale > 0:
        raise ValueError(f"logit_scale = {logit_scale} must be positive.")
    columns, hidden = weight.shape
    elements = _CHUNK_ELEMENTS.get(x.device.type, 1 << 27)
    chunk = chunk_tokens or max(1, elements // columns)
    return _unembedding_cross_entropy(
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
