"""Norms, alone and chained with the scaled residual sum that precedes them: one kernel, one read and write of the stream."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from megatron_completep import kernels
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.parameter import Site, Spec, make_parameter
from megatron_completep.roles import Role


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
        self.norm = kernels.Norm(kind, eps)
        self.queue = context.queue
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
        join: kernels.Join | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(y, norm(y)) with y = residual + scale * dropout(branch + branch_bias), all [..., size]; without a branch y is residual.

        Gradients of gain and biases go to the queue, which also decides when they are summed over the rows.
        """
        vectors = (self.weight, self.bias)
        if branch is None:
            dtype = self.weight.dtype
            return residual, kernels.norm(residual, *vectors, self.norm, dtype, self.queue)
        join = join or kernels.Join()
        return kernels.scaled_residual_norm(
            residual,
            branch,
            branch_bias,
            *vectors,
            join,
            self.norm,
            self.queue,
        )
