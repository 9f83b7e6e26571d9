"""The MLP branch: up (or gate and up in one matrix), non-linearity, down."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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


# By the name of model.activation. For the backward pass each keeps its input and nothing else:
# `MLP.activation_bytes` counts on it.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "squared_relu": kernels.squared_relu,
    "swiglu": kernels.swiglu,
}
GATED = frozenset({"swiglu"})  # activations that read gate and up, each of the inner width
# Those that may be compiled. torch's own are one pass already.
OURS: dict[str, Callable[..., Tensor]] = {
    "squared_relu": kernels.squared_relu,
    "swiglu": kernels.swiglu,
}


def activation_of(
    name: str, compiled: kernels.CompiledDefinitions | None
) -> Callable[[Tensor], Tensor]:
    """The activation of this name; one of ours is taken from `compiled`, where that serves it."""
    if compiled is None or name not in OURS:
        return ACTIVATIONS[name]
    return partial(OURS[name], compiled=compiled)


def without_keeping(
    activation: Callable[[Tensor], Tensor], up: Tensor, down: Callable[[Tensor], Tensor]
) -> Tensor:
    """down(activation(up)), which keeps `up` alone.

    The activation keeps `up` anyway, so that the input of `down` can be made of it again.
    """
    activated = activation(up)
    shape = activated.shape
    activation_input = up.detach()

    def pack(saved: Tensor) -> Tensor | None:
        # `down` saves its input and its weights, which have other shapes, and stay.
        return None if saved.shape == shape else saved

    def unpack(packed: Tensor | None) -> Tensor:
        if packed is not None:
            return packed
        with torch.no_grad():
            return activation(activation_input)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return down(activated)


class MLP(nn.Module):
    """The MLP branch: x [s, B, H] -> [s, B, H].

    recompute_selectively: the down projection keeps no input for backward, which applies the
        activation again.
    shared_width: inner width of an MLP beside experts; the proxy's is the same multiple of its
        hidden size.
    """

    def __init__(
        self,
        model: ModelConfig,
        table: Table,
        context: LayerContext,
        layer: int,
        recompute_selectively: bool = False,
        shared_width: int | None = None,
    ):
        super().__init__()
        ffn = shared_width or model.ffn_hidden_size
        hidden = model.hidden_size
        matrices = {"gate": ffn, "up": ffn} if model.activation in GATED else {"up": ffn}
        base_hidden = table.base_hidden_size
        base_ffn = table.base_ffn_hidden_size
        if shared_width is not None:
            base_ffn = max(1, round(shared_width * base_hidden / hidden))
        self.activation = activation_of(model.activation, context.compiled)
        self.recompute_selectively = recompute_selectively
        self.up = ColumnParallelLinear(hidden, matrices, base_hidden, model.bias, context)
        self.down = RowParallelLinear(ffn, hidden, base_ffn, model.bias, context)

    def forward(self, x: Tensor, inputs: object = None) -> Branch:
        """x [s, B, H] -> the branch's output [s, B, H] and its bias. inputs: not used."""
        up = self.up(x)
        if self.recompute_selectively and torch.is_grad_enabled():
            out = without_keeping(self.activation, up, self.down)
        else:
            out = self.down(self.activation(up))
        return Branch(out, self.down.bias)

    def flops(self, seq_length: int) -> float:
        """Matrix FLOPs of the forward pass a token, of the logical branch."""
        return self.up.flops() + self.down.flops()

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes kept for backward: the inputs of both matrices and of the activation."""
        activation_input = sizes.tokens * self.up.weight.shape[0] * sizes.element_bytes
        down_input = 0 if self.recompute_selectively else self.down.activation_bytes(sizes)
        return self.up.activation_bytes(sizes) + activation_input + down_input
