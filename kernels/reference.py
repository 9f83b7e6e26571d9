"""Plain torch definition of every operation.

It is the specification that the CPU path and the Triton kernels are tested against. It is written
to be read, not to be fast: each function is differentiable by autograd, and its gradient is the
definition of the fused backward. Arithmetic is float32, or float64 when the tensors are float64.
Shapes: [..., H] is any leading shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .control import read_control


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the arithmetic: float64 when any of the tensors is float64, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


SEED_SIZE = 7  # elements of what `dropout_seed` returns
SUM_COLUMNS = 128  # of a row of logits, whose exponentials are summed before float64 takes over


@dataclass(frozen=True)
class Join:
    """How a branch joins the stream: y = residual + scale * dropout(branch + branch_bias)."""

    scale: float = 1.0  # CompleteP's depth multiplier m_L^-alpha
    dropout_p: float = 0.0  # the probability that an element of the branch is left out
    seed: Tensor | None = None  # of `dropout_seed`, on the branch's device: decides which ones

    def under(self, seed: Tensor | None) -> Join:
        """This join with the dropout of `seed`.

        Without a seed (validation, generation) nothing is dropped.
        """
        if seed is None:
            return self if self.dropout_p == 0.0 else Join(self.scale)
        return Join(self.scale, self.dropout_p, seed)

    @property
    def dropout_seed(self) -> Tensor | None:
        """The seed, or None where nothing is dropped; ValueError where dropout has no seed."""
        if self.dropout_p == 0.0:
            return None
        if self.seed is None:
            raise ValueError(
                f"dropout_p = {self.dropout_p} needs a seed: pass kernels.dropout_seed(key) on the "
                "same device."
            )
        if self.seed.numel() != SEED_SIZE:
            raise ValueError(
                f"the seed of dropout has {self.seed.numel()} elements, not {SEED_SIZE}: make it "
                "by kernels.dropout_seed(key)."
            )
        return self.seed


@dataclass(frozen=True)
class Norm:
    """Which norm reads the residual stream."""

    kind: str = "layernorm"  # or "rmsnorm"
    eps: float = 1e-5  # added to the variance, or to the mean square

    @property
    def rms(self) -> bool:
        """Whether this is RMSNorm, which does not subtract the mean.

        Raises ValueError for a kind that is not defined.
        """
        if self.kind not in ("layernorm", "rmsnorm"):
            raise ValueError(f'kind = {self.kind!r} must be "layernorm" or "rmsnorm".')
        return self.kind == "rmsnorm"


def scaled_add(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    join: Join,
) -> Tensor:
    """`residual + scale * dropout(branch + branch_bias)` [..., H].

    The result is rounded once, to the residual's dtype.
    """
    math_dtype = compute_dtype(residual, branch)
    update = branch.to(math_dtype)
    if branch_bias is not None:
        update = update + branch_bias.to(math_dtype)
    if join.dropout_seed is not None:
        update = update * dropout_factor(update.shape, join).to(math_dtype)
    y = residual.to(math_dtype) + join.scale * update
    return y.to(residual.dtype)


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The norm of `x` [..., H] over its last dimension, times `weight` plus `bias`."""
    return norm_with_statistics(x, weight, bias, norm, out_dtype or x.dtype)[0]


def norm_with_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(the norm, mean [rows] (empty for RMSNorm), rstd [rows]), as the operators return them."""
    math_dtype = compute_dtype(x, weight)
    centred = x.to(math_dtype)
    mean = centred.new_empty(0)
    if not norm.rms:
        mean = centred.mean(-1, keepdim=True)
        centred = centred - mean
    variance = centred.square().mean(-1, keepdim=True)
    rstd = (variance + norm.eps).rsqrt()
    out = centred * rstd * weight.to(math_dtype)
    if bias is not None:
        out = out + bias.to(math_dtype)
    return out.to(out_dtype), mean.flatten(), rstd.flatten()


def scaled_residual_norm(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    join: Join,
    norm_of_y: Norm,
) -> tuple[Tensor, Tensor]:
    """(y, out): the new residual stream, in the residual's dtype, and its norm, in the branch's."""
    return residual_norm_with_statistics(
        residual, branch, branch_bias, weight, bias, join, norm_of_y
    )[:2]


def residual_norm_with_statistics(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    join: Join,
    norm_of_y: Norm,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, out, mean, rstd), as the operators return them."""
    y = scaled_add(residual, branch, branch_bias, join)
    return y, *norm_with_statistics(y, weight, bias, norm_of_y, branch.dtype)


# Constants of Philox 4x32: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEYS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF  # mask of the low 32 bits


def _multiply_32(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """(high, low) 32-bit halves of the 64-bit product.

    int64 wraps round, which keeps the low 64 bits right.
    """
    product = x * multiplier
    return (product >> 32) & _LOW, product & _LOW


def philox_4x32(seed: Tensor, counter: Tensor) -> Tensor:
    """Four random 32-bit words [..., 4] (in int64) for each int64 counter.

    Philox 4x32 with 10 rounds, as `tl.randint4x` computes it.
    """
    key = seed.reshape(())
    key_0 = key & _LOW
    key_1 = (key >> 32) & _LOW
    c_0 = counter & _LOW
    c_1 = (counter >> 32) & _LOW
    c_2 = torch.zeros_like(c_0)
    c_3 = torch.zeros_like(c_0)

    for _ in range(10):
        high_0, low_0 = _multiply_32(c_0, _PHILOX_MULTIPLIERS[0])
        high_2, low_2 = _multiply_32(c_2, _PHILOX_MULTIPLIERS[1])
        # The new c_0 and c_2 need the previous round's c_1 and c_3, so c_1 and c_3 are replaced
        # last.
        c_0 = high_2 ^ c_1 ^ key_0
        c_2 = high_0 ^ c_3 ^ key_1
        c_1 = low_2
        c_3 = low_0
        key_0 = (key_0 + _PHILOX_KEYS[0]) & _LOW
        key_1 = (key_1 + _PHILOX_KEYS[1]) & _LOW
    return torch.stack((c_0, c_1, c_2, c_3), dim=-1)


def dropout_seed(
    key: int,
    batch: int = 1,
    first_sample: int = 0,
    seq_length: int = 0,
    start: int = 0,
    turn: int = 2**62,
    second_start: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """What decides a mask, int64 [7]: a key, and which rows of the whole batch the tensor holds.

    A mask is a function of the key, the sample, the position and the column, so that ranks that
    divide samples or positions between them draw what one process draws. With the key alone rows
    are numbered as they come.

    Args:
        key: 63 bits, another one for each step and each place of dropout in the model.
        batch: sequences of the tensor [s, batch, H].
        first_sample: number of the first of them.
        seq_length: positions of a whole sequence.
        start: the position in it of the tensor's first row.
        turn: number of positions after which the tensor goes on at `second_start`, if it holds two
            parts of a sequence.

    Raises ValueError if there are samples and no length: they would all draw the same mask.
    """
    if (batch > 1 or first_sample > 0) and seq_length < 1:
        raise ValueError(
            f"batch = {batch} and first_sample = {first_sample} need the seq_length of the samples."
        )
    numbers = [key, batch, first_sample, seq_length, start, turn, second_start]
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def dropout_rows(seed: Tensor, rows: int) -> Tensor:
    """int64 [rows]: the numbers of the rows of [s, B, H] in the whole batch, sample by sample."""
    _, batch, first_sample, seq_length, start, turn, second_start = seed.unbind()
    row = torch.arange(rows, device=seed.device)
    index = row // batch
    sample = row % batch + first_sample
    position = index + start
    position = torch.where(index < turn, position, index - turn + second_start)
    return sample * seq_length + position


def dropout_factor(shape: torch.Size, join: Join) -> Tensor:
    """float32 [..., H]: 0 with probability p, else 1 / (1 - p).

    It is a pure function of the seed and the position: column c of the row with number r
    (`dropout_rows`) is word c % 4 of Philox counter r * ceil(H / 4) + c // 4. So a recomputed
    forward draws the same mask.
    """
    seed = join.dropout_seed
    if seed is None:
        return torch.ones(shape)
    hidden = shape[-1]
    rows = shape[:-1].numel()
    row_counters = (hidden + 3) // 4  # each gives the words of four columns
    first_counters = dropout_rows(seed, rows)[:, None] * row_counters
    counter = first_counters + torch.arange(row_counters, device=seed.device)
    words = philox_4x32(seed[0], counter).view(rows, row_counters * 4)[:, :hidden]

    # The upper 24 bits of a word are what float32 holds exactly.
    uniform = (words >> 8).to(torch.float32) * 2.0**-24
    threshold = torch.tensor(join.dropout_p, dtype=torch.float32, device=seed.device)
    stays = (uniform >= threshold).to(torch.float32)
    factor = stays * (1.0 / (1.0 - join.dropout_p))
    return factor.view(shape)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` for [..., 2F] = [gate | up] -> [..., F]."""
    gate, up = gate_up.to(compute_dtype(gate_up)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """`max(x, 0)^2`."""
    return torch.relu(x.to(compute_dtype(x))).square().to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the pairs (i, i + D/2) of `x` [S, B, N, D]; `inverse` rotates back.

    `cos` and `sin` of the angles are [S, 1 or B, D/2].
    """
    math_dtype = compute_dtype(x)
    low, high = x.to(math_dtype).chunk(2, dim=-1)
    cos = cos.to(math_dtype).unsqueeze(2)
    sin = sin.to(math_dtype).unsqueeze(2)
    if inverse:
        sin = -sin
    rotated_low = low * cos - high * sin
    rotated_high = high * cos + low * sin
    return torch.cat((rotated_low, rotated_high), dim=-1).to(x.dtype)


def join_heads(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient [S, B, N + 2G, D] of fused heads, whose queries and keys were rotated.

    `d_q` [S, B, N, D], `d_k` and `d_v` [S, B, G, D]; `cos` and `sin` as for `rotary`.
    """
    d_queries = rotary(d_q, cos, sin, inverse=True)
    d_keys = rotary(d_k, cos, sin, inverse=True)
    return torch.cat((d_queries, d_keys, d_v), dim=2)


def normed_heads(
    heads: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_heads: int,
    norm_of_heads: Norm,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of `heads` [S, B, N + 2 G, D], normed, then rotated; and the values.

    Each head has its own norm. All heads of queries share q_gain [D], all heads of keys k_gain [D].
    The norm is rounded before the rotation.
    """
    key_heads = (heads.shape[2] - query_heads) // 2
    q, k, v = heads.split_with_sizes((query_heads, key_heads, key_heads), dim=2)
    q = rotary(norm(q, q_gain, None, norm_of_heads), cos, sin)
    k = rotary(norm(k, k_gain, None, norm_of_heads), cos, sin)
    return q, k, v


def adamw_(
    parameter_out: Tensor | None,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    segments: Tensor,
    groups: Tensor,
    control: Tensor,
    beta1: float,
    beta2: float,
) -> None:
    """AdamW over a flat shard, in float64, every result rounded once to its storage.

    See `ops.adamw.adamw_` for the shapes.
    """
    numbers = read_control(control)
    if numbers.skip:
        return
    for start, length, group in segments.tolist():
        lr_factor, weight_decay, eps = groups[group].tolist()
        elements = slice(start, start + length)
        p = master[elements].double()
        m = exp_avg[elements].double()
        v = exp_avg_sq[elements].double()
        g = numbers.clip * grad[elements].double()

        m = m + (1 - beta1) * (g - m)
        v = v + (1 - beta2) * (g * g - v)
        root = torch.sqrt(v / numbers.correction2)
        update = m / numbers.correction1 / (root + eps) + weight_decay * p
        master[elements] = p - numbers.learning_rate * lr_factor * update
        exp_avg[elements] = m
        exp_avg_sq[elements] = v
        # The copy is rounded from the stored master, not from the float64 result.
        if parameter_out is not None:
            parameter_out[elements] = master[elements]


def sum_of_squares(flat: Tensor, segments: Tensor | None = None) -> Tensor:
    """Sum of the squares of `flat` [n], or of the `segments` [k, 3] of it, as a float64 scalar."""
    if segments is None:
        return flat.double().square().sum()
    sums = [flat.new_zeros((), dtype=torch.float64)]  # the sum over no segments is 0
    for start, length, _ in segments.tolist():
        sums.append(flat[start : start + length].double().square().sum())
    return torch.stack(sums).sum()


def begin_step_(
    control: Tensor, sum_sq: Tensor, max_norm: float, beta1: float, beta2: float
) -> None:
    """Decide a step from the summed squares of all gradients; see `ops.grad_norm.begin_step_`."""
    norm = math.sqrt(float(sum_sq))
    finite = math.isfinite(norm)
    clip = 1.0
    if max_norm > 0 and finite:
        clip = min(1.0, max_norm / (norm + 1e-6))

    previous = read_control(control)
    step = previous.step + (1 if finite else 0)
    decided = previous._replace(
        step=step,
        clip=clip,
        skip=0.0 if finite else 1.0,
        correction1=1 - beta1**step,
        correction2=1 - beta2**step,
        grad_norm=norm,
    )
    control.copy_(torch.tensor(decided, dtype=torch.float64))


def _padding(logits: Tensor, vocab_start: int, vocab_size: int) -> Tensor | None:
    """Which columns [V] pad the vocabulary; None, which costs no mask: no column does."""
    columns = logits.shape[1]
    if vocab_start + columns <= vocab_size:
        return None
    return torch.arange(columns, device=logits.device) >= vocab_size - vocab_start


def _sum_of_rows(x: Tensor) -> Tensor:
    """[T, V] -> [T], added up in x's precision within parts of a row, and in float64 over them.

    Compiled sums in float32 add up one by one; float64 for a whole row takes up to twice the time.
    """
    if x.shape[1] % SUM_COLUMNS == 0:
        x = x.unflatten(1, (-1, SUM_COLUMNS)).sum(2)
    return x.sum(1, dtype=torch.float64)


def cross_entropy_forward(
    logits: Tensor,
    labels: Tensor,
    vocab_start: int,
    vocab_size: int,
    logit_scale: float = 1.0,
    with_sum: bool = False,
    math_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Row statistics of one vocabulary shard; see `ops.cross_entropy.cross_entropy_forward`.

    math_dtype: of the arithmetic; float32 where this is compiled.
    """
    scaled = logits.to(math_dtype) * logit_scale
    padding = _padding(logits, vocab_start, vocab_size)
    if padding is not None:
        scaled = scaled.masked_fill(padding, -math.inf)
    maximum = scaled.amax(1)
    # Where every column is padding the maximum is -inf, and -inf - (-inf) would be NaN.
    finite_maximum = maximum.clamp_min(torch.finfo(math_dtype).min)
    sum_exp = _sum_of_rows(torch.exp(scaled - finite_maximum[:, None]))

    # Labels of another shard read column 0 instead, and their logit is then replaced by 0.
    column = labels - vocab_start
    in_shard = (column >= 0) & (column < logits.shape[1]) & (labels < vocab_size)
    index = torch.where(in_shard, column, 0)[:, None]
    target = scaled.gather(1, index)[:, 0].masked_fill(~in_shard, 0.0)

    rows = [maximum, sum_exp, target]
    if with_sum:
        rows.append(_sum_of_rows(scaled.masked_fill(scaled == -math.inf, 0.0)))
    return torch.stack([row.double() for row in rows]).to(compute_dtype(logits))


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
    math_dtype: torch.dtype = torch.float64,
) -> None:
    """Write the gradient of the raw logits over them; math_dtype as above.

    See `ops.cross_entropy.cross_entropy_backward_`.
    """
    # Whatever padding has here, its gradient is 0 in the end.
    scaled = logits.to(math_dtype) * logit_scale
    lse = lse.to(math_dtype)
    softmax = torch.exp(scaled - lse[:, None])

    # The smoothed target is a distribution over the true vocabulary.
    column = vocab_start + torch.arange(logits.shape[1], device=logits.device)
    is_target = (column == labels[:, None]).to(math_dtype)
    smoothed_target = (1 - label_smoothing) * is_target + label_smoothing / vocab_size

    # The z-loss adds d(z_loss * lse^2)/dz = 2 * z_loss * lse * softmax.
    factor = logit_scale * grad_scale.to(math_dtype).expand(labels.shape)
    softmax_factor = (1 + 2 * z_loss * lse)[:, None]
    gradient = factor[:, None] * (softmax_factor * softmax - smoothed_target)
    is_zero = (labels == ignore_index)[:, None]
    padding = _padding(logits, vocab_start, vocab_size)
    if padding is not None:
        is_zero = is_zero | padding
    logits.copy_(gradient.masked_fill(is_zero, 0.0))


def unembedding_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss of `ops.cross_entropy.unembedding_cross_entropy`, in float64.

    It is differentiable by autograd.
    """
    unscaled = x.double() @ weight[:vocab_size].double().T
    logits = logit_scale * unscaled.flatten(0, -2)
    labels = labels.flatten()
    loss = torch.nn.functional.cross_entropy(
        logits,
        labels,
        reduction="sum",
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    counted = labels != ignore_index
    squared_lse = torch.logsumexp(logits, 1).square()
    loss = loss + z_loss * (squared_lse * counted).sum()
    # The mean over no tokens is 0, not NaN.
    return loss / counted.sum().clamp(min=1) if reduction == "mean" else loss


def float8_dtype(gradient: bool) -> torch.dtype:
    """e5m2 for gradients, which need range; e4m3 for inputs and weights, which need precision."""
    return torch.float8_e5m2 if gradient else torch.float8_e4m3fn


def float8_cast(x: Tensor, amax: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """(x / scale rounded to float8, scale float32 []), for x [m, n] with magnitudes up to `amax`.

    The scale is the smallest power of two that is greater than amax / (the type's largest number),
    so that `amax` comes into the upper octave. Rounding is to nearest even, and what is larger than
    `amax` allows becomes the largest number. Where `amax` is 0 the scale is 1, where it is not
    finite it is NaN: a failing run stays one.
    """
    dtype = float8_dtype(gradient)
    largest = torch.finfo(dtype).max
    # Scale and inverse are to be normal numbers.
    quotient = (amax.float() * (1.0 / largest)).clamp(min=torch.finfo(torch.float32).tiny)
    _, exponent = torch.frexp(quotient)  # quotient < 2^exponent
    scale = torch.ldexp(torch.ones_like(quotient), exponent.clamp(max=126))
    scale = torch.where(amax == 0, 1.0, scale)
    scale = torch.where(amax.isfinite(), scale, torch.nan)
    scaled = (x.float() / scale).clamp(-largest, largest)
    return scaled.to(dtype), scale
