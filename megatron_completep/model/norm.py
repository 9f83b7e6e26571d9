"""Norms, alone and chained with the scaled residual sum that precedes them: one kernel, one read and write of the stream."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron_completep import kernels
from megatron_completep.parallel.gradients import Accumulate, GradientQueue
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.parameter import Site, Spec, make_parameter
from megatron_completep.roles import Role


@dataclass(frozen=True)
class ResidualSum:
    """How a branch joins the stream: y = residual + scale * dropout(branch + bias)."""

    scale: float  # m_L^-alpha
    dropout_p: float = 0.0

    def under(self, seed: Tensor | None) -> ResidualSum:
        """Without a seed (validation, generation) nothing is dropped."""
        return self if seed is not None else ResidualSum(self.scale)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension; statistics in fp32 (fp64 for float64), gain 1 and bias 0 at the start.

    partial_over: the axis of which the rows seen here are one rank's share (sequence shard, or its own heads). site: which
    forward multiplier acts behind it.
    """

    def __init__(
        self,
        size: int,
        role: Role,
        kind: str,
        eps: float,
        bias: bool,
        context: LayerContext,
        partial_over: str | None = None,
        site: Site | None = None,
    ):
        super().__init__()
        self.kind, self.eps, self.queue = kind, eps, context.queue
        gain = Spec(role, (size,), partial_over=partial_over, constant=1.0, site=site)
        self.weight = make_parameter(gain, context.ranks)
        self.bias: nn.Parameter | None = None
        if bias and kind == "layernorm":
            self.bias = make_parameter(replace(gain, constant=0.0), context.ranks)

    def forward(
        self,
        residual: Tensor,
        branch: Tensor | None = None,
        branch_bias: Tensor | None = None,
        join: ResidualSum | None = None,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(y, norm(y)) with y = residual + scale * dropout(branch + branch_bias), all [..., size]; without a branch y is residual."""
        join = (join or ResidualSum(1.0)).under(seed)
        if branch is None:
            return residual, _ScaledResidualNorm.apply(residual, None, None, self.weight, self.bias, self, join, None)
        return _ScaledResidualNorm.apply(residual, branch, branch_bias, self.weight, self.bias, self, join, seed)


class _ScaledResidualNorm(torch.autograd.Function):
    """Input gradients through autograd, gradients of the vectors through the queue, which also decides when they are reduced."""

    @staticmethod
    def forward(ctx, residual, branch, branch_bias, weight, bias, norm: Norm, join: ResidualSum, seed):
        rms = norm.kind == "rmsnorm"
        y, out, mean, rstd = kernels.residual_norm_forward(
            residual, branch, branch_bias, weight, bias, join.scale, norm.eps, rms, join.dropout_p, seed, weight.dtype
        )
        ctx.save_for_backward(y, mean, rstd, weight, seed)
        ctx.norm, ctx.join, ctx.has_branch = norm, join, branch is not None
        ctx.vectors = [p for p in (norm.weight, norm.bias, branch_bias) if p is not None]
        ctx.has_bias, ctx.has_branch_bias = bias is not None, branch_bias is not None
        ctx.set_materialize_grads(False)
        return out if branch is None else (y, out)

    @staticmethod
    def backward(ctx, *gradients):
        d_y, d_out = gradients if ctx.has_branch else (None, *gradients)
        y, mean, rstd, weight, seed = ctx.saved_tensors
        d_residual, d_branch, partials = kernels.residual_norm_backward(
            d_y,
            d_out,
            y,
            mean,
            rstd,
            weight,
            ctx.has_branch,
            ctx.has_bias,
            ctx.has_branch_bias,
            ctx.join.scale,
            ctx.norm.kind == "rmsnorm",
            ctx.join.dropout_p,
            seed,
        )
        for row, vector in enumerate(ctx.vectors):
            ctx.norm.queue.push(vector, accumulate_partials(partials, row))
        return d_residual, d_branch if ctx.has_branch else None, None, None, None, None, None, None


def accumulate_partials(partials: Tensor, row: int) -> Accumulate:
    """main_grad (+)= the column sums of one row of the kernel's partial sums [P, K, H]."""

    def accumulate(main_grad: Tensor, first: bool) -> None:
        if first:
            main_grad.zero_()
        kernels.reduce_partials(partials, row, main_grad)

    return accumulate


class _ScaledAdd(torch.autograd.Function):
    """The sum alone, for the end of a pipeline stage: one tensor crosses the boundary."""

    @staticmethod
    def forward(ctx, residual, branch, branch_bias, join: ResidualSum, seed, queue: GradientQueue):
        ctx.save_for_backward(seed)
        ctx.branch_dtype, ctx.branch_bias, ctx.join, ctx.queue = branch.dtype, branch_bias, join, queue
        return kernels.scaled_add(residual, branch, branch_bias, join.scale, join.dropout_p, seed)

    @staticmethod
    def backward(ctx, d_y):
        (seed,) = ctx.saved_tensors
        bias = ctx.branch_bias
        d_branch, partials = kernels.scaled_add_backward(d_y, bias is not None, ctx.join.scale, ctx.join.dropout_p, seed, ctx.branch_dtype)
        if bias is not None:
            ctx.queue.push(bias, accumulate_partials(partials, 0))
        return d_y, d_branch, None, None, None, None


def scaled_add(
    residual: Tensor, branch: Tensor, branch_bias: Tensor | None, join: ResidualSum, seed: Tensor | None, queue: GradientQueue
) -> Tensor:
    """residual + scale * dropout(branch + branch_bias), all [s, B, H]."""
    return _ScaledAdd.apply(residual, branch, branch_bias, join.under(seed), seed, queue)
