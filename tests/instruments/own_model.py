"""A user's own decoder: plain torch modules that declare their roles.

Two versions, one of which forgets the residual multiplier.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_completep.completep import Table
from megatron_completep.config.schema import Config
from megatron_completep.model.initialize import initialize
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.parameter import declare
from megatron_completep.roles import Role


class Decoder(nn.Module):
    """MLP blocks and a causal mean in place of attention: enough to have a residual stream."""

    def __init__(self, config: Config, table: Table, multiplier: float):
        super().__init__()
        model, base = config.model, table.base_hidden_size
        width = model.hidden_size
        self.multiplier, self.logit_multiplier = multiplier, table.logit_multiplier
        self.embedding = nn.Embedding(model.vocab_size, width)
        declare(self.embedding.weight, Role.EMBEDDING)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * model.num_layers))
        self.linears = nn.ModuleList(
            nn.Linear(width, width, bias=False) for _ in range(2 * model.num_layers)
        )
        for norm, linear in zip(self.norms, self.linears, strict=True):
            declare(norm.weight, Role.PRE_NORM)
            declare(linear.weight, Role.HIDDEN_WEIGHT, width, base)
        self.final = nn.RMSNorm(width)
        declare(self.final.weight, Role.FINAL_NORM)
        self.head = nn.Linear(width, model.vocab_size, bias=False)
        declare(self.head.weight, Role.UNEMBEDDING)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        counts = torch.arange(1, tokens.shape[1] + 1)[:, None]
        for index, (norm, linear) in enumerate(zip(self.norms, self.linears, strict=True)):
            mixed = norm(x)
            mixed = mixed.cumsum(1) / counts if index % 2 == 0 else F.gelu(mixed)
            x = x + self.multiplier * linear(mixed)
        logits = self.head(self.final(x)) * self.logit_multiplier
        return (
            logits
            if labels is None
            else F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        )


def build(config: Config, table: Table, multiplier: float) -> nn.Module:
    model = Decoder(config, table, multiplier)
    initialize(model, table, config.optimizer, config.training.seed)
    return model


def right(config: Config, table: Table, context: ParallelContext) -> nn.Module:
    return build(config, table, table.residual_multiplier)


def forgets_the_multiplier(config: Config, table: Table, context: ParallelContext) -> nn.Module:
    return build(config, table, 1.0)
