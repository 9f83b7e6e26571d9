"""Cross-entropy on CPU tensors: the same functions as in `reference`, a block of rows at a time.

A block of logits stays in the cache through all its passes, so main memory is crossed once forward
and once backward. float64 takes the definition itself: tests compare it to the last digits.
"""

import math

import torch
from torch import Tensor

from .. import reference

LOGITS_BLOCK = 1 << 18  # elements of logits held in the cache at a time


def cross_entropy_forward(
    logits: Tensor,
    labels: Tensor,
    vocab_start: int,
    vocab_size: int,
    logit_scale: float = 1.0,
    with_sum: bool = False,
) -> Tensor:
    """Row statistics of one vocabulary shard: see `ops.cross_entropy.cross_entropy_forward`."""
    if logits.dtype == torch.float64:
        return reference.cross_entropy_forward(
            logits, labels, vocab_start, vocab_size, logit_scale, with_sum
        )
    tokens, columns = logits.shape
    valid = max(0, min(columns, vocab_size - vocab_start))  # columns that are no padding
    stats = torch.zeros(4 if with_sum else 3, tokens, dtype=torch.float32)
    stats[0] = -math.inf
    if valid == 0 or tokens == 0:
        return stats

    block = max(8, LOGITS_BLOCK // columns)
    scratch = torch.empty(min(block, tokens), valid, dtype=torch.float32)
    for begin in range(0, tokens, block):
        rows = slice(begin, begin + block)
        tile = scratch[: min(block, tokens - begin)]
        stored = logits[rows, :valid]
        raw = stored if logits.dtype == torch.float32 else tile.copy_(stored)
        if with_sum:
            stats[3, rows] = raw.sum(1) * logit_scale
        stats[0, rows] = raw.amax(1) * logit_scale
        # Written into the scratch tile: the logits are read again by the backward.
        exponent = torch.add(-stats[0, rows, None], raw, alpha=logit_scale, out=tile)
        stats[1, rows] = exponent.exp_().sum(1)

    index, in_shard = _label_columns(labels, vocab_start, valid)
    target = logits.gather(1, index)[:, 0].float() * logit_scale
    stats[2] = torch.where(in_shard, target, 0.0)
    return stats


def _label_columns(labels: Tensor, vocab_start: int, valid: int) -> tuple[Tensor, Tensor]:
    """(index [T, 1], in_shard [T]): the column of each label, 0 where it is not in this shard."""
    column = labels - vocab_start
    in_shard = (column >= 0) & (column < valid)
    return torch.where(in_shard, column, 0)[:, None], in_shard


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
    """Write the gradient of the raw logits over them.

    See `ops.cross_entropy.cross_entropy_backward_`.
    """
    if logits.dtype == torch.float64:
        terms = (ignore_index, z_loss, label_smoothing, vocab_size, logit_scale)
        reference.cross_entropy_backward_(logits, labels, vocab_start, lse, grad_scale, *terms)
        return
    tokens, columns = logits.shape
    valid = max(0, min(columns, vocab_size - vocab_start))  # columns that are no padding
    logits[:, valid:] = 0
    if valid == 0 or tokens == 0:
        return

    # One number a row multiplies the softmax, and one is added at the label. A label of another
    # shard adds 0 to column 0.
    row_scale = (logit_scale * grad_scale.float()).expand(tokens)
    row_scale = row_scale.masked_fill(labels == ignore_index, 0.0)
    softmax_scale = row_scale * (1 + 2 * z_loss * lse)
    index, in_shard = _label_columns(labels, vocab_start, valid)
    at_label = torch.where(in_shard, -(1 - label_smoothing) * row_scale, 0.0)[:, None]

    block = max(8, LOGITS_BLOCK // columns)
    scratch = None if logits.dtype == torch.float32 else torch.empty(min(block, tokens), valid)
    for begin in range(0, tokens, block):
        rows = slice(begin, begin + block)
        stored = logits[rows, :valid]
        tile = stored if scratch is None else scratch[: stored.shape[0]].copy_(stored)
        exponent = torch.add(-lse[rows, None], tile, alpha=logit_scale, out=tile)
        exponent.exp_().mul_(softmax_scale[rows, None])
        if label_smoothing:
            tile.sub_((label_smoothing / vocab_size * row_scale[rows])[:, None])
        tile.scatter_add_(1, index[rows], at_label[rows])
        if scratch is not None:
            stored.copy_(tile)
