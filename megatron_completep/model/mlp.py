"""The MLP branch: up (or gate and up in one matrix), non-linearity, down."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_completep import kernels
from megatron_completep.completep import Table
from megatron_completep.config.schema import ModelConfig
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.gradients import GradientQueue
from megatron_completep.parallel.linear import ColumnParallelLinear, RowParallelLinear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "squared_relu": kernels.squared_relu, "swiglu": kernels.swiglu}


class MLP(nn.Module):
    """x [s, B, H] -> branch [s, B, H] without its bias, which joins in the residual sum."""

    def __init__(self, model: ModelConfig, table: Table, context: ParallelContext, queue: GradientQueue):
        super().__init__()
        ffn, hidden = model.ffn_hidden_size, model.hidden_size
        parts = (ffn, ffn) if model.activation == "swiglu" else (ffn,)
        self.activation = ACTIVATIONS[model.activation]
        self.up = ColumnParallelLinear(hidden, parts, table.base_hidden_size or hidden, model.bias, context, queue)
        self.down = RowParallelLinear(ffn, hidden, table.base_ffn_hidden_size or ffn, model.bias, context, queue)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))
