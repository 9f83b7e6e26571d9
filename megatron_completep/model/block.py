"""One decoder layer: for each of its branches a norm of the stream, then the branch.

The branch's output is held in the stream for the next norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast, runtime_checkable

from torch import Tensor, nn

from megatron_completep.completep import Table
from megatron_completep.config.schema import ModelConfig
from megatron_completep.errors import ConfigError
from megatron_completep.model.attention import Attention, AttentionInputs
from megatron_completep.model.mlp import MLP
from megatron_completep.model.norm import StreamNorm
from megatron_completep.model.stream import Branch, Stream
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.micro_batch import MicroBatchSizes
from megatron_completep.roles import Role


@runtime_checkable
class BranchModule(Protocol):
    """A branch of a layer: what it computes, and what that costs.

    The plan, the MFU of a run and the reports add the costs up. A branch that trains without
    answering `flops` and `activation_bytes` is refused there by its name.
    """

    def __call__(self, x: Tensor, inputs: AttentionInputs) -> Branch:
        """x [s, B, H] and what all layers share -> the output, which joins the stream scaled."""
        ...

    def flops(self, seq_length: int) -> float:
        """Matrix FLOPs of the forward pass, per token of a sequence of this length.

        Of the logical branch, whatever ranks share it; without what recomputation adds.
        """
        ...

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes that the forward pass of a micro-batch keeps on this rank for the backward pass.

        Parameters and the residual stream, which the norm before the branch keeps, do not count.
        """
        ...


class BranchMaker(Protocol):
    """Makes the branch of one layer, whose number counts over the whole model.

    recompute: whether backward makes again what is cheap to make (training.recompute: selective).
    """

    def __call__(
        self, model: ModelConfig, table: Table, context: LayerContext, layer: int, recompute: bool
    ) -> nn.Module: ...


# The branches of a layer, in order. A name is part of the names of parameters, which seed the
# initial weights.
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
        # Beside the registered modules, in order: the branches of a layer are not known by name.
        self.branches: list[tuple[StreamNorm, BranchModule]] = []
        for name, make in branches.items():
            norm = StreamNorm(model, table, Role.PRE_NORM, context)
            branch = make(model, table, context, layer, recompute == "selective")
            self.add_module(f"{name}_norm", norm)
            self.add_module(name, branch)
            self.branches.append((norm, cast(BranchModule, branch)))

    def forward(self, stream: Stream, inputs: AttentionInputs) -> Stream:
        """The stream after all branches but the last have joined it, and the last one pending."""
        for norm, branch in self.branches:
            stream, x = norm(stream)
            stream = stream.hold(branch(x, inputs))
        return stream

    def flops(self, seq_length: int) -> float:
        """Matrix FLOPs of the forward pass a token, of the logical layer; norms have none."""
        return sum(branch.flops(seq_length) for _, branch in self._planned_branches())

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes kept on this rank for backward, without recomputation of whole layers."""
        total = 0
        # Full recomputation keeps what enters a layer instead, which the model counts.
        for norm, branch in self._planned_branches():
            total += norm.activation_bytes(sizes) + branch.activation_bytes(sizes)
        return total

    def _planned_branches(self) -> list[tuple[StreamNorm, BranchModule]]:
        """The branches, if all say what they cost: none may silently count as nothing."""
        names = {module: name for name, module in self.named_children()}
        for _, branch in self.branches:
            if not isinstance(branch, BranchModule):
                raise ConfigError(
                    f"a layer's {names[branch]}: the branch does not say what it costs, so that no "
                    "plan can count it. Give it the methods flops(seq_length) and "
                    "activation_bytes(sizes), as model/block.py describes them in BranchModule."
                )
        return self.branches
