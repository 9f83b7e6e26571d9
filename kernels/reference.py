"""Plain torch definition of every operation: the specification that the CPU path and the Triton kernels are tested against.

Written to be read, not to be fast: each function is differentiable by autograd, and its gradient is the definition of the
fused backward. Arithmetic is float32, or float64 when the tensors are float64. Shapes: [..., H] is any leading shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .control import read_control


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype arithmetic runs in: float64 when any given tensor is float64, else float32."""
    return (
        torch.float64
        if any(t is not None and t.dtype == torch.float64 for t in tensors)
        else torch.float32
    )


# --- scaled residual norm ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Join:
    """How a branch joins the residual stream: y = residual + scale * dropout(branch + branch_bias)."""

    scale: float = 1.0  # CompleteP's depth multiplier m_L^-alpha
    dropout_p: float = 0.0  # the probability that an element of the branch is left out
    seed: Tensor | None = None  # int64, one element, on the branch's device: decides which

    def under(self, seed: Tensor | None) -> Join:
        """This join with the dropout of `seed`; without a seed (validation, generation) nothing is dropped."""
        return Join(self.scale) if seed is None else Join(self.scale, self.dropout_p, seed)

    @property
    def dropout_seed(self) -> Tensor | None:
        """The seed, or None where nothing is dropped; ValueError where dropout has no seed."""
        if self.dropout_p == 0.0:
            return None
        if self.seed is None:
            raise ValueError(
                f"dropout_p = {self.dropout_p} needs a seed: pass an int64 tensor with one element on the same device."
            )
        return self.seed


@dataclass(frozen=True)
class Norm:
    """Which norm reads the stream: "layernorm" or "rmsnorm", with `eps` added to the variance or mean square."""

    kind: str = "layernorm"
    eps: float = 1e-5

    @property
    def rms(self) -> bool:
        """Whether the mean stays; ValueError for a kind that nobody defined."""
        if self.kind not in ("layernorm", "rmsnorm"):
            raise ValueError(f'kind = {self.kind!r} must be "layernorm" or "rmsnorm".')
        return self.kind == "rmsnorm"


def scaled_add(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    join: Join,
) -> Tensor:
    """`residual + scale * dropout(branch + branch_bias)` [..., H], rounded once, to the residual's dtype."""
    wide = compute_dtype(residual, branch)
    update = branch.to(wide)
    if branch_bias is not None:
        update = update + branch_bias.to(wide)
    if join.dropout_seed is not None:
        update = update * dropout_factor(update.shape, join).to(wide)
    return (residual.to(wide) + join.scale * update).to(residual.dtype)


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The norm of the stored `x` over its last dimension, times `weight` plus `bias`."""
    wide = compute_dtype(x, weight)
    x_wide = x.to(wide)
    centred = x_wide if norm.rms else x_wide - x_wide.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    out = centred * rstd * weight.to(wide)
    return (out if bias is None else out + bias.to(wide)).to(out_dtype or x.dtype)


def scaled_residual_norm(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    join: Join,
    norm_of_y: Norm,
) -> tuple[Tensor, Tensor]:
    """(y, out): the new residual stream and its norm; `out` has the branch's dtype, `y` the residual's."""
    y = scaled_add(residual, branch, branch_bias, join)
    return y, norm(y, weight, bias, norm_of_y, branch.dtype)


# --- dropout ----------------------------------------------------------------------------------------------------------------------

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEYS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _multiply_32(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """(high, low) 32-bit halves of the 64-bit product: int64 wraps round, which keeps the low 64 bits right."""
    product = x * multiplier
    return (product >> 32) & _LOW, product & _LOW


def philox_4x32(seed: Tensor, counter: Tensor) -> Tensor:
    """Four random 32-bit words [..., 4] (in int64) for each int64 counter: Philox 4x32, 10 rounds, as `tl.randint4x`."""
    key_0, key_1 = seed.reshape(()) & _LOW, (seed.reshape(()) >> 32) & _LOW
    c_0, c_1 = counter & _LOW, (counter >> 32) & _LOW
    c_2 = c_3 = torch.zeros_like(c_0)
    for _ in range(10):
        high_0, low_0 = _multiply_32(c_0, _PHILOX_MULTIPLIERS[0])
        high_2, low_2 = _multiply_32(c_2, _PHILOX_MULTIPLIERS[1])
        c_0, c_1, c_2, c_3 = high_2 ^ c_1 ^ key_0, low_2, high_0 ^ c_3 ^ key_1, low_0
        key_0, key_1 = (key_0 + _PHILOX_KEYS[0]) & _LOW, (key_1 + _PHILOX_KEYS[1]) & _LOW
    return torch.stack((c_0, c_1, c_2, c_3), dim=-1)


def dropout_factor(shape: torch.Size, join: Join) -> Tensor:
    """float32 [..., H]: 0 with probability p, else 1 / (1 - p); a pure function of the seed and the position.

    Column c of row r is word c % 4 of Philox counter r * ceil(H / 4) + c // 4, so a recomputed forward draws the same mask.
    """
    seed = join.dropout_seed
    if seed is None:
        return torch.ones(shape)
    hidden = shape[-1]
    groups = (hidden + 3) // 4
    rows = shape[:-1].numel()
    counter = torch.arange(rows * groups, device=seed.device).view(rows, groups)
    words = philox_4x32(seed, counter).view(rows, groups * 4)[:, :hidden]
    uniform = (words >> 8).to(torch.float32) * 2.0**-24
    keep = uniform >= torch.tensor(join.dropout_p, dtype=torch.float32, device=seed.device)
    return (keep.to(torch.float32) * (1.0 / (1.0 - join.dropout_p))).view(shape)


# --- activations and positions ----------------------------------------------------------------------------------------------------


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` for [..., 2F] = [gate | up] -> [..., F]."""
    gate, up = gate_up.to(compute_dtype(gate_up)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """`max(x, 0)^2`."""
    return torch.relu(x.to(compute_dtype(x))).square().to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the pairs (i, i + D/2) of [S, B, N, D] by the angles whose cos and sin are [S, 1 or B, D/2]; `inverse` rotates back."""
    wide = compute_dtype(x)
    first, second = x.to(wide).chunk(2, dim=-1)
    cos, sin = cos.to(wide).unsqueeze(2), sin.to(wide).unsqueeze(2)
    sin = -sin if inverse else sin
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


# --- optimizer --------------------------------------------------------------------------------------------------------------------


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
    """AdamW over a flat shard, in float64, every result rounded once to its storage; see `ops.adamw.adamw_`."""
    step = read_control(control)
    if step.skip:
        return
    for start, length, group in segments.tolist():
        lr_factor, weight_decay, eps = groups[group].tolist()
        piece = slice(start, start + length)
        p, m, v = master[piece].double(), exp_avg[piece].double(), exp_avg_sq[piece].double()
        g = step.clip * grad[piece].double()
        m = m + (1 - beta1) * (g - m)
        v = v + (1 - beta2) * (g * g - v)
        root = torch.sqrt(v / step.correction2)
        update = m / step.correction1 / (root + eps) + weight_decay * p
        master[piece] = p - step.learning_rate * lr_factor * update
        exp_avg[piece], exp_avg_sq[piece] = m, v
        if parameter_out is not None:
            parameter_out[piece] = master[piece]


def sum_of_squares(flat: Tensor, segments: Tensor | None = None) -> Tensor:
    """Sum of the squares of `flat` [n], or of the pieces that `segments` [k, 3] names, as a float64 scalar."""
    if segments is None:
        return flat.double().square().sum()
    pieces = [
        flat[start : start + length].double().square().sum()
        for start, length, _ in segments.tolist()
    ]
    return torch.stack([flat.new_zeros((), dtype=torch.float64), *pieces]).sum()


def begin_step_(
    control: Tensor, sum_sq: Tensor, max_norm: float, beta1: float, beta2: float
) -> None:
    """From the summed squares of all gradients: norm, clip coefficient, skip flag, step and bias corrections."""
    norm = math.sqrt(float(sum_sq))
    finite = math.isfinite(norm)
    before = read_control(control)
    step = before.step + (1 if finite else 0)
    now = before._replace(
        step=step,
        clip=min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 and finite else 1.0,
        skip=0.0 if finite else 1.0,
        correction1=1 - beta1**step,
        correction2=1 - beta2**step,
        grad_norm=norm,
    )
    control.copy_(torch.tensor(now, dtype=torch.float64))


# --- cross-entropy ----------------------------------------------------------------------------------------------------------------


def _valid_logits(logits: Tensor, vocab_start: int, vocab_size: int, logit_scale: float) -> Tensor:
    """The scaled logits in float64, with the columns that pad the vocabulary at minus infinity."""
    column = vocab_start + torch.arange(logits.shape[1], device=logits.device)
    return (logits.double() * logit_scale).masked_fill(column >= vocab_size, -math.inf)


def cross_entropy_forward(
    logits: Tensor,
    labels: Tensor,
    vocab_start: int,
    valid_vocab: int,
    logit_scale: float = 1.0,
    with_sum: bool = False,
) -> Tensor:
    """Row statistics of one vocabulary shard; see `ops.cross_entropy.cross_entropy_forward`."""
    scaled = _valid_logits(logits, vocab_start, valid_vocab, logit_scale)
    maximum = scaled.amax(1)
    sum_exp = torch.exp(scaled - maximum.clamp_min(-1e300)[:, None]).sum(1)
    local = labels - vocab_start
    here = (local >= 0) & (local < logits.shape[1]) & (labels < valid_vocab)
    target = scaled.gather(1, torch.where(here, local, 0)[:, None])[:, 0].masked_fill(~here, 0.0)
    rows = [maximum, sum_exp, target]
    if with_sum:
        rows.append(scaled.masked_fill(scaled == -math.inf, 0.0).sum(1))
    return torch.stack(rows).to(compute_dtype(logits))


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
    """Write the gradient of the raw logits over them; see `ops.cross_entropy.cross_entropy_backward_`."""
    scaled = _valid_logits(logits, vocab_start, vocab_size, logit_scale)
    lse = lse.double()
    factor = logit_scale * grad_scale.double().expand(labels.shape)
    softmax = torch.exp(scaled - lse[:, None])
    column = vocab_start + torch.arange(logits.shape[1], device=logits.device)
    is_target, is_valid = (column == labels[:, None]).double(), (column < vocab_size).double()
    wanted = (1 - label_smoothing) * is_target + label_smoothing / vocab_size * is_valid
    gradient = factor[:, None] * ((1 + 2 * z_loss * lse)[:, None] * softmax - wanted)
    logits.copy_(
        gradient.masked_fill((labels == ignore_index)[:, None] | (column >= vocab_size), 0.0)
    )


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
    """The loss of `ops.cross_entropy.unembedding_cross_entropy`, in float64 and differentiable by autograd."""
    logits = logit_scale * (x.double() @ weight[:vocab_size].double().T).flatten(0, -2)
    cross_entropy = torch.nn.functional.cross_entropy
    loss = cross_entropy(
        logits,
        labels.flatten(),
        reduction="sum",
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    kept = labels.flatten() != ignore_index
    loss = loss + z_loss * (torch.logsumexp(logits, 1).square() * kept).sum()
    return loss / kept.sum().clamp(min=1) if reduction == "mean" else loss
