"""One decoder layer: norm -> attention -> (scaled add + norm) -> MLP, whose sum is left pending for the next norm.

s sequence (or this tensor rank's share of it), B micro-batch, H hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron_completep import kernels
from megatron_completep.completep import Table
from megatron_completep.config.schema import ModelConfig
from megatron_completep.model.attention import Attention, AttentionInputs
from megatron_completep.model.mlp import MLP
from megatron_completep.model.norm import Norm
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.parameter import Site
from megatron_completep.roles import Role


class Block(nn.Module):
    """residual [s, B, H] and the pending branch of the layer before -> residual and this layer's pending MLP branch."""

    def __init__(self, model: ModelConfig, table: Table, context: LayerContext, recompute: str = "none"):
        super().__init__()
        self.join = kernels.Join(table.residual_multiplier, model.dropout)
        self.attention_norm = pre_norm(model, Role.PRE_NORM, context)
        self.attention = Attention(model, table, context, recompute == "selective")
        self.mlp_norm = pre_norm(model, Role.PRE_NORM, context)
        self.mlp = MLP(model, table, context, recompute == "selective")

    def forward(
        self,
        residual: Tensor,
        pending: Tensor | None,
        pending_bias: Tensor | None,
        inputs: AttentionInputs,
        layer: int,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        join = self.join.under(site_seed(seed, 2 * layer))
        residual, x = self.attention_norm(residual, pending, pending_bias, join)
        branch = self.attention(x, inputs, layer)
        join = self.join.under(site_seed(seed, 2 * layer + 1))
        residual, x = self.mlp_norm(residual, branch, self.attention.output.bias, join)
        return residual, self.mlp(x)


def pre_norm(
    model: ModelConfig,
    role: Role,
    context: LayerContext,
    site: Site | None = None,
) -> Norm:
    """A norm on the residual stream; under sequence parallelism it sees this rank's part of the sequence."""
    return Norm(
        model.hidden_size,
        role,
        model.norm,
        model.norm_eps,
        model.bias,
        context,
        context.ranks.sequence.partial_over,
        site,
    )


def site_seed(seed: Tensor | None, site: int) -> Tensor | None:
    """The dropout seed of one residual sum; `site` counts them through the depth of the whole model."""
    return None if seed is None else seed + site
