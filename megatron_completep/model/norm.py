"""Norms: alone, and on the residual stream.

There one kernel adds the pending branch and norms the sum.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from megatron_completep import kernels
from megatron_completep.completep import Table
from megatron_completep.config.schema import ModelConfig
from megatron_completep.model.stream import Stream
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.micro_batch import MicroBatchSizes
from megatron_completep.parallel.parameter import ForwardMultiplier, Spec, make_parameter
from megatron_completep.roles import Role


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the dimension [size] of x [..., size].

    Statistics are fp32 (fp64 for float64); the gain is 1 and the bias 0 at the start. Gradients of
    both go to the queue, which also decides when they are summed over the rows.

    partial_over: the axis of the mesh, if any, of whose rows this rank sees a share (its part of
        the sequence, or its own heads).
    forward_multiplier: the one that is applied directly after the norm, if any.
    """

    def __init__(
        self,
        size: int,
        role: Role,
        norm: kernels.Norm,
        bias: bool,
        context: LayerContext,
        partial_over: str | None = None,
        forward_multiplier: ForwardMultiplier | None = None,
    ):
        super().__init__()
        self.norm = norm
        self.queue = context.queue
        self.compiled = context.compiled
        gain = Spec(
            role,
            (size,),
            partial_over=partial_over,
            constant=1.0,
            forward_multiplier=forward_multiplier,
        )
        self.weight = make_parameter(gain, context.ranks)
        self.bias: nn.Parameter | None = None
        if bias and norm.kind == "layernorm":  # RMSNorm has none
            self.bias = make_parameter(replace(gain, constant=0.0), context.ranks)

    def forward(self, x: Tensor) -> Tensor:
        """norm(x), [..., size] in the weight's type."""
        dtype = self.weight.dtype
        return kernels.norm(x, self.weight, self.bias, self.norm, dtype, self.queue, self.compiled)

    def statistics_bytes(self, rows: int, sizes: MicroBatchSizes) -> int:
        """Bytes kept for backward beside the input: each row's inverse deviation, and its mean."""
        statistics = 2 if self.norm.kind == "layernorm" else 1  # RMSNorm takes no mean
        return rows * statistics * sizes.wide_bytes


class StreamNorm(Norm):
    """The norm before a branch, or the last one; it sees this rank's part of the sequence."""

    def __init__(
        self,
        model: ModelConfig,
        table: Table,
        role: Role,
        context: LayerContext,
        forward_multiplier: ForwardMultiplier | None = None,
    ):
        norm = kernels.Norm(model.norm, model.norm_eps)
        # Under sequence parallelism a rank sees its rows alone: its gradients of gain and bias are
        # shares of a sum.
        partial_over = context.ranks.sequence.partial_over
        super().__init__(
            model.hidden_size, role, norm, model.bias, context, partial_over, forward_multiplier
        )
        self.join = join_of(model, table)

    def forward(self, stream: Stream) -> tuple[Stream, Tensor]:  # type: ignore[override]
        """(the stream with the pending branch added, its norm [s, B, H])."""
        if stream.pending is None:
            # Before the model's or the stage's first branch there is nothing to add.
            return stream.joined(stream.residual), super().forward(stream.residual)
        # One pass over memory adds the branch, its bias and dropout, and norms the sum.
        out, bias = stream.pending
        residual, normed = kernels.scaled_residual_norm(
            stream.residual,
            out,
            bias,
            self.weight,
            self.bias,
            self.join.under(stream.branch_seed()),
            self.norm,
            self.queue,
            self.compiled,
        )
        return stream.joined(residual), normed

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes kept for backward: the stream after the addition, and its statistics.

        The norm itself is kept by the projection that reads it.
        """
        stream = sizes.local_tokens * self.weight.shape[0] * sizes.stream_bytes
        return stream + self.statistics_bytes(sizes.local_tokens, sizes)


def join_of(model: ModelConfig, table: Table) -> kernels.Join:
    """How branches join the stream: scaled by m_L^-alpha, with the model's dropout."""
    return kernels.Join(table.residual_multiplier, model.dropout)
