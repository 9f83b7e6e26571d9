"""Norms, alone and chained with the scaled residual sum that precedes them: one kernel, one read and write of the stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_completep import kernels
from megatron_completep.completep import Role, declare
from megatron_completep.parallel.gradients import GradientQueue
from megatron_completep.parallel.placement import Placement, place


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension; statistics in fp32 (fp64 for float64), gain 1 and bias 0 at the start.

    `partial_gradient`: the rows seen here are one tensor rank's share (sequence shard, or its own heads).
    """

    def __init__(
        self,
        size: int,
        role: Role,
        kind: str,
        eps: float,
        bias: bool,
        queue: GradientQueue,
        device: torch.device,
        partial_gradient: bool = False,
    ):
        super().__init__()
        self.norm = kernels.Norm(kind, eps)
        self.queue = queue
        placement = Placement((size,), partial_gradient=partial_gradient)
        self.weight = place(declare(nn.Parameter(torch.ones(size, device=device)), role), placement)
        has_bias = bias and kind == "layernorm"
        self.bias = place(declare(nn.Parameter(torch.zeros(size, device=device)), role), placement) if has_bias else None

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
