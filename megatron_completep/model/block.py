"""One decoder layer: for each of its branches a norm of the stream, the branch, and the branch held for the next norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

from torch import Tensor, nn

from megatron_completep.completep import Table
from megatron_completep.config.schema import ModelConfig
from megatron_completep.model.attention import Attention, AttentionInputs
from megatron_completep.model.mlp import MLP
from megatron_completep.model.norm import StreamNorm
from megatron_completep.model.stream import Branch, Stream
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.roles import Role


class BranchModule(Protocol):
    """A branch: x [s, B, H] and what all layers share -> its output, which joins the stream scaled."""

    def __call__(self, x: Tensor, inputs: AttentionInputs) -> Branch: ...


class BranchMaker(Protocol):
    """Makes the branch of one layer, whose number counts over the whole model."""

    def __call__(
        self, model: ModelConfig, table: Table, context: LayerContext, layer: int, recompute: bool
    ) -> nn.Module: ...


# The branches of a layer, in order. A name is part of the names of parameters, which seed the initial weights.
BRANCHES: Mapping[str, BranchMaker] = {"attention": Attention, "mlp": MLP}


class Block(nn.Module):
    """The modules NAME_norm and NAME of every branch."""

    attention: Attention
    mlp: MLP

    def __init__(
        self,
        model: ModelConfig,
        table: Table,
        context: LayerContext,
        layer: int,
        recompute: str = "none",
        branches: Mapping[str, BranchMaker] = BRANCHES,
    ):
        super().__init__()
        self.branches: list[tuple[StreamNorm, BranchModule]] = []
        for name, make in branches.items():
            norm = StreamNorm(model, table, Role.PRE_NORM, context)
            branch = make(model, table, context, layer, recompute == "selective")
            self.add_module(f"{name}_norm", norm)
            self.add_module(name, branch)
            self.branches.append((norm, cast(BranchModule, branch)))

    def forward(self, stream: Stream, inputs: AttentionInputs) -> Stream:
        for norm, branch in self.branches:
            stream, x = norm(stream)
            stream = stream.hold(branch(x, inputs))
        return stream
