"""One decoder layer: for each of its branches a norm, then the branch.

A branch's output is not added here. It stays pending in `Stream`, and the kernel of the next norm
adds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast, runtime_checkable

from torch import Tensor, nn

from megatron_completep.completep import Table
from megatron_completep.config.schema import ModelConfig
from megatron_completep.errors import ConfigError
from megatron_completep.model.attention import Attention, AttentionInputs
from megatron_completep.model.experts import mlp_or_experts
from megatron_completep.model.mlp import MLP
from megatron_completep.model.norm import StreamNorm
from megatron_completep.model.stream import Branch, Stream
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.micro_batch import MicroBatchSizes
from megatron_completep.roles import Role


@runtime_checkable
class BranchModule(Protocol):
    """A branch of a layer: what it computes, and what that costs.

    Plans, MFU and reports sum these costs. A branch that lacks `flops` or `activation_bytes` can be
    trained, but they raise a ConfigError that names it.
    """

    def __call__(self, x: Tensor, inputs: AttentionInputs) -> Branch:
        """The branch's output for x [s, B, H], before it is scaled and added to the stream.

        inputs: what all layers share, such as rotary cos and sin.
        """
        ...

    def flops(self, seq_length: int) -> float:
        """Matmul FLOPs of the forward pass, per token of a sequence of this length.

        Counts the whole branch before any tensor-parallel split, and excludes recomputation.
        """
        ...

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes that the forward pass of a micro-batch keeps on this rank for the backward pass.

        Excludes parameters, and the residual stream, which the norm before the branch keeps.
        """
        ...


class BranchMaker(Protocol):
    """Builds the branch of one layer. `layer` is the global layer index, from 0.

    recompute_selectively: whether backward recomputes activations that are cheap to compute
        (training.recompute: selective).
    """

    def __call__(
        self,
        model: ModelConfig,
        table: Table,
        context: LayerContext,
        layer: int,
        recompute_selectively: bool,
    ) -> nn.Module: ...


# The branches of a layer, in order. The keys are part of parameter names, and a parameter's initial
# weights are seeded by its name, so renaming a key changes them.
BRANCHES: Mapping[str, BranchMaker] = {"attention": Attention, "mlp": mlp_or_experts}


class Block(nn.Module):
    """One decoder layer; it registers submodules NAME_norm and NAME for each branch."""

    # For type checkers and tests; only the default BRANCHES have these names.
    attention_norm: StreamNorm
    attention: Attention
    mlp_norm: StreamNorm
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
        # A plain list next to the registered submodules: `forward` iterates in this order and needs
        # no branch names.
        self.branches: list[tuple[StreamNorm, BranchModule]] = []
        for name, make in branches.items():
            norm = StreamNorm(model, table, Role.PRE_NORM, context)
            branch = make(model, table, context, layer, recompute == "selective")
            self.add_module(f"{name}_norm", norm)
            self.add_module(name, branch)
            self.branches.append((norm, cast(BranchModule, branch)))

    def forward(self, stream: Stream, inputs: AttentionInputs) -> Stream:
        """Run all branches. In the returned stream the last branch's output is still pending."""
        for norm, branch in self.branches:
            stream, x = norm(stream)
            stream = stream.hold(branch(x, inputs))
        return stream

    def flops(self, seq_length: int) -> float:
        """Matmul FLOPs of the forward pass per token, for the whole, unsplit layer."""
        # Norms have no matmuls.
        return sum(branch.flops(seq_length) for _, branch in self._planned_branches())

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes kept on this rank for backward, without recomputation of whole layers."""
        total = 0
        # Under full recomputation only the layer's inputs are kept; GPT._bytes_of_layers counts
        # those instead.
        for norm, branch in self._planned_branches():
            total += norm.activation_bytes(sizes) + branch.activation_bytes(sizes)
        return total

    def _planned_branches(self) -> list[tuple[StreamNorm, BranchModule]]:
        """The branches.

        Raises ConfigError if one lacks the cost methods, so that none is counted as zero.
        """
        names = {module: name for name, module in self.named_children()}
        for _, branch in self.branches:
            if not isinstance(branch, BranchModule):
                raise ConfigError(
                    f"a layer's {names[branch]}: the branch has no flops(seq_length) and "
                    "activation_bytes(sizes), so its cost cannot be planned. "
                    "Implement both; see BranchModule in model/block.py."
                )
        return self.branches
