"""The parameterization of one run: Table 1 at its shape, batch scaling, and the user's own factors.

    table = table_of(config)
    table.values(Role.HIDDEN_WEIGHT, width_ratio=4.0, optimizer=config.optimizer)
    table.residual_multiplier

Nothing here knows a module or a parameter's name, and nothing needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from megatron_completep.completep import table as table_1
from megatron_completep.completep.batch import BatchScaling, batch_scaling_of
from megatron_completep.config.derived import head_dim
from megatron_completep.config.schema import Config, ModelConfig, OptimizerConfig, RoleFactors
from megatron_completep.roles import Role


@dataclass(frozen=True)
class Factors:
    """What multiplies the proxy's base values; also used for the final values themselves."""

    init_std: float
    lr: float
    weight_decay: float
    eps: float


@dataclass(frozen=True, kw_only=True)
class Table:
    """Forward multipliers, and factors by role. Frozen; made once, from the global shape, by `table_of`."""

    base_hidden_size: int  # of the proxy: what modules take their base fan-ins from
    base_ffn_hidden_size: int
    width_multiplier: float = 1.0  # m_N; 1 under SP
    depth_multiplier: float = 1.0  # m_L; 1 under muP and SP
    alpha: float = 1.0
    attention_scale: float = 1.0  # of the attention logits
    base_residual_multiplier: float = 1.0  # a tunable factor on every branch, beside the table's
    base_logit_multiplier: float = 1.0  # a tunable factor on the logits, beside the table's
    rule: str = "adamw"  # the update rule whose columns `factors` takes
    scale_width: bool = True  # False under SP, where a matrix's own ratio does not count either
    batch: BatchScaling = field(default_factory=BatchScaling)
    own_factors: Mapping[Role, RoleFactors] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def residual_multiplier(self) -> float:
        """What multiplies each branch's output, bias included, before it joins the stream."""
        return self._forward.residual

    @property
    def logit_multiplier(self) -> float:
        """What multiplies the logits in training, evaluation and generation."""
        return self._forward.unembedding

    def factors(self, role: Role, width_ratio: float = 1.0) -> Factors:
        """Factors of one parameter.

        width_ratio: fan_in / base_fan_in of the logical matrix; 1 for vectors and the vocabulary's tables.
        """
        ratio = width_ratio if self.scale_width else 1.0
        rows = table_1.RULES[self.rule]
        row = rows(self.width_multiplier, self.depth_multiplier, self.alpha, ratio)[role]
        own = self.own_factors.get(role, RoleFactors())
        scale = self.batch.scale
        return Factors(
            init_std=math.sqrt(row.variance) * own.init_std,
            lr=row.lr * own.lr * scale,
            weight_decay=row.weight_decay * own.weight_decay * scale,
            eps=row.eps * own.eps / scale,
        )

    def values(self, role: Role, width_ratio: float, optimizer: OptimizerConfig) -> Factors:
        """Final initial standard deviation, peak learning rate, weight decay and epsilon of one parameter."""
        factors = self.factors(role, width_ratio)
        return Factors(
            init_std=factors.init_std * optimizer.base_init_std,
            lr=factors.lr * optimizer.base_lr,
            weight_decay=factors.weight_decay * optimizer.base_weight_decay,
            eps=factors.eps * optimizer.base_eps,
        )

    @property
    def _forward(self) -> table_1.Forward:
        base = table_1.Forward(self.base_residual_multiplier, self.base_logit_multiplier)
        return table_1.forward(self.width_multiplier, self.depth_multiplier, self.alpha, base)


def table_of(config: Config) -> Table:
    """The table of a run, from the **global** model shape: a shard or a stage never sees another m_N or m_L."""
    model, base = config.model, config.completep
    scale_width = base.parameterization != "sp"
    scale_depth = base.parameterization == "completep"
    base_hidden_size = base.base_hidden_size or model.hidden_size
    base_num_layers = base.base_num_layers or model.num_layers
    return Table(
        width_multiplier=model.hidden_size / base_hidden_size if scale_width else 1.0,
        depth_multiplier=model.num_layers / base_num_layers if scale_depth else 1.0,
        alpha=base.alpha if scale_depth else 1.0,
        attention_scale=_attention_scale(model, base.base_head_dim, scale_width),
        base_residual_multiplier=model.residual_multiplier,
        base_logit_multiplier=model.logit_multiplier,
        base_hidden_size=base_hidden_size,
        base_ffn_hidden_size=base.base_ffn_hidden_size
        or _ffn_of_same_ratio(model, base_hidden_size),
        scale_width=scale_width,
        batch=batch_scaling_of(config),
        own_factors=MappingProxyType(dict(base.factors)),
    )


def _ffn_of_same_ratio(model: ModelConfig, base_hidden_size: int) -> int:
    return max(1, round(model.ffn_hidden_size * base_hidden_size / model.hidden_size))


def _attention_scale(model: ModelConfig, base_head_dim: int | None, scale_width: bool) -> float:
    """The model's own factor times the rule of `model.attention_scale`; SP knows one rule."""
    rule = model.attention_scale if scale_width else "1/sqrt(head_dim)"
    size = head_dim(model)
    if rule == "1/head_dim":
        return model.attention_multiplier * (1 / size)
    if rule == "1/sqrt(head_dim)":
        return model.attention_multiplier * (1 / math.sqrt(size))
    # sqrt(base_head_dim) / head_dim, written so that at the base it is SP's scale to the last bit.
    return model.attention_multiplier * (
        math.sqrt((base_head_dim or size) / size) / math.sqrt(size)
    )
