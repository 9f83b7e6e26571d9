"""The MLP branch: up (or gate and up in one matrix), non-linearity, down."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_completep import kernels
from megatron_completep.completep import Table
from megatron_completep.config.schema import ModelConfig
from megatron_completep.model.stream import Branch
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_completep.parallel.micro_batch import MicroBatchSizes


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, elementwise."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "squared_relu": kernels.squared_relu,
    "swiglu": kernels.swiglu,
}


class MLP(nn.Module):
    """The MLP branch: x [s, B, H] -> [s, B, H].

    recompute: the down projection keeps no input for backward; the activation makes it again.
    """

    def __init__(
        self,
        model: ModelConfig,
        table: Table,
        context: LayerContext,
        layer: int,
        recompute: bool = False,
    ):
        super().__init__()
        ffn = model.ffn_hidden_size
        hidden = model.hidden_size
        parts = {"gate": ffn, "up": ffn} if model.activation == "swiglu" else {"up": ffn}
        self.activation = ACTIVATIONS[model.activation]
        self.recompute = recompute
        self.up = ColumnParallelLinear(hidden, parts, table.base_hidden_size, model.bias, context)
        self.down = RowParallelLinear(ffn, hidden, table.base_ffn_hidden_size, model.bias, context)

    def forward(self, x: Tensor, inputs: object = None) -> Branch:
        """inputs: what attention needs; nothing here does."""
        up = self.up(x)
        if self.recompute and torch.is_grad_enabled():
            out = self._down_without_keeping(up)
        else:
            out = self.down(self.activation(up))
        return Branch(out, self.down.bias)

    def _down_without_keeping(self, up: Tensor) -> Tensor:
        """What `down` would save of its input is made again from `up`, which the activation keeps anyway."""
        activated = self.activation(up)
        shape, kept = activated.shape, up.detach()

        def pack(saved: Tensor) -> Tensor | None:
            return None if saved.shape == shape else saved  # the other is the weight, a matrix

        def unpack(packed: Tensor | None) -> Tensor:
            if packed is not None:
                return packed
            with torch.no_grad():
                return self.activation(kept)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return self.down(activated)

    def flops(self, seq_length: int) -> float:
        """Matrix FLOPs of the forward pass a token, of the logical branch."""
        return self.up.flops() + self.down.flops()

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes kept for backward: the inputs of both matrices and of the activation."""
        activation_input = sizes.tokens * self.up.weight.shape[0] * sizes.element_bytes
        down_input = 0 if self.recompute else self.down.activation_bytes(sizes)
        return self.up.activation_bytes(sizes) + activation_input + down_input
