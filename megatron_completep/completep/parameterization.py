"""The parameterization of one run: Table 1 at its shape, batch scaling, and the user's own factors.

    table = table_of(config)
    table.values(Role.HIDDEN_WEIGHT, width_ratio=4.0, optimizer=config.optimizer)
    table.residual_multiplier

Nothing here knows a module or the name of a parameter, and nothing needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from megatron_completep.completep import table as table_1
from megatron_completep.completep.batch import BatchScaling, batch_scaling_of
from megatron_completep.config.derived import (
    base_expert_ffn_hidden_size,
    expert_ffn_hidden_size,
    head_dim,
)
from megatron_completep.config.schema import Config, ModelConfig, OptimizerConfig, RoleFactors
from megatron_completep.errors import ConfigError
from megatron_completep.roles import LAYER_MATRICES, Role


@dataclass(frozen=True)
class Factors:
    """The factors on the proxy's base values; also the type of the final values themselves."""

    init_std: float
    lr: float
    weight_decay: float
    eps: float


@dataclass(frozen=True)
class DecayRule:
    """How `optimizer.weight_decay_rule` changes the table's weight decay.

    table: not at all. inverse_width: that of hidden weights, experts and routers falls as 1 / m_N
    (arXiv 2512.05620, for runs of compute-optimal length). tau: all that decays has the same
    tau = 1 / (peak learning rate x weight decay x steps), counted without the user's own factors.

    base_products: base_lr x base_weight_decay of each section (`table.Row.section`), for tau.
    """

    name: str = "table"
    target_tau: float | None = None
    steps: int = 1
    base_products: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    def factor(self, role: Role, row: table_1.Row, m_N: float, scale: float) -> float:
        """The factor on the proxy's weight decay, in place of `row.weight_decay`.

        scale: S of the batch scaling, which is on learning rate and weight decay as well.
        """
        if self.name == "inverse_width" and role in LAYER_MATRICES:
            return row.weight_decay / m_N
        if self.name == "tau" and row.weight_decay:
            assert self.target_tau is not None
            # Of a weight decay whose factor is 1.
            decayed_per_step = self.base_products[row.section] * row.lr * scale**2
            return 1 / (self.steps * self.target_tau * decayed_per_step)
        return row.weight_decay


@dataclass(frozen=True, kw_only=True)
class Table:
    """Forward multipliers, and factors by role. Made once, from the global shape, by `table_of`."""

    # Of the proxy: the project's own modules take their base fan-ins from these sizes. Models
    # that declare their base fan-ins themselves, or have none, do without.
    base_hidden_size: int = 0
    base_ffn_hidden_size: int = 0
    base_expert_ffn_hidden_size: int = 0
    experts: table_1.ExpertRatios = table_1.NO_EXPERTS  # 1 and 1 under SP
    width_multiplier: float = 1.0  # m_N; 1 under SP
    depth_multiplier: float = 1.0  # m_L; 1 under muP and SP
    alpha: float = 1.0
    attention_scale: float = 1.0  # of the attention logits
    base_residual_multiplier: float = 1.0  # a tunable factor on every branch, beside the table's
    base_logit_multiplier: float = 1.0  # a tunable factor on the logits, beside the table's
    rule: str = "adamw"  # the update rule whose columns `factors` takes
    scale_width: bool = True  # False under SP, where a matrix's own ratio does not count either
    batch: BatchScaling = field(default_factory=BatchScaling)
    decay: DecayRule = field(default_factory=DecayRule)
    own_factors: Mapping[Role, RoleFactors] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def for_shape(
        cls,
        *,
        width: int,
        base_width: int,
        depth: int,
        base_depth: int,
        head_dim: int | None = None,
        base_head_dim: int | None = None,
        parameterization: str = "completep",
        alpha: float = 1.0,
        **settings: Any,
    ) -> Table:
        """The table of a model of any trainer, from its sizes and those of its proxy.

        Raises ConfigError for a parameterization that is not known and for sizes below 1.

        Args:
            width: of the residual stream.
            depth: blocks of one attention and one MLP branch.
            head_dim, base_head_dim: for `attention_scale`, which is no number without head_dim; the
                proxy's head is as wide as the model's unless it is given.
            parameterization: completep, mup (width alone) or sp (neither).
            settings: further fields of the table.
        """
        if parameterization not in ("completep", "mup", "sp"):
            raise ConfigError(
                f"parameterization = {parameterization}: not known. Use completep, mup or sp."
            )
        sizes = {"width": width, "base_width": base_width, "depth": depth, "base_depth": base_depth}
        heads = {"head_dim": head_dim, "base_head_dim": base_head_dim}
        sizes |= {name: size for name, size in heads.items() if size is not None}
        # Written so that NaN is no size either.
        no_sizes = [
            f"{name} = {size!r}"
            for name, size in sizes.items()
            if not (isinstance(size, int | float) and 1 <= size < math.inf)
        ]
        if no_sizes:
            raise ConfigError(f"{', '.join(no_sizes)}: a size is a whole number of at least 1.")
        if not 0.5 <= alpha <= 1:
            raise ConfigError(f"alpha = {alpha}: use 1 (CompleteP), or from 0.5 to 1.")
        scale_width = parameterization != "sp"
        scale_depth = parameterization == "completep"
        # Nothing may be computed with a scale that nobody gave: NaN is seen in the first loss.
        scale = math.nan
        if head_dim is not None:
            base = base_head_dim if scale_width else None
            scale = attention_scale(head_dim, base or head_dim)
        shape = {
            "width_multiplier": width / base_width if scale_width else 1.0,
            "depth_multiplier": depth / base_depth if scale_depth else 1.0,
            "alpha": alpha if scale_depth else 1.0,
            "attention_scale": scale,
            "base_hidden_size": base_width,
            "scale_width": scale_width,
        }
        return cls(**{**shape, **settings})

    @property
    def residual_multiplier(self) -> float:
        """The factor on a branch's output, bias included, before it joins the residual stream."""
        return self._forward.branch

    @property
    def logit_multiplier(self) -> float:
        """The factor on the logits in training, evaluation and generation."""
        return self._forward.unembedding

    @property
    def router_loss_multiplier(self) -> float:
        """The factor on the coefficients of a router's balance loss and z-loss."""
        return self._forward.router_losses

    def factors(
        self, role: Role, width_ratio: float = 1.0, matrix: table_1.Matrix | None = None
    ) -> Factors:
        """Factors of one parameter: those of the table, of the user and of the batch.

        Raises ConfigError where the batch scaling is not a positive number.

        Args:
            width_ratio: fan_in / base_fan_in of the logical matrix; 1 for vectors, the embedding
                and the unembedding.
            matrix: (d_out, d_in) of the logical matrix; None for vectors. AdamW does not ask.
        """
        row = self._row(role, width_ratio, matrix)
        user_factors = self.own_factors.get(role, RoleFactors())

        # S scales what acts at every step (arXiv 2512.22382), which the initial weights do not.
        scale = self.batch.scale
        weight_decay = self.decay.factor(role, row, self.width_multiplier, scale)
        return Factors(
            init_std=math.sqrt(row.variance) * user_factors.init_std,
            lr=row.lr * user_factors.lr * scale,
            weight_decay=weight_decay * user_factors.weight_decay * scale,
            eps=row.eps * user_factors.eps / scale,
        )

    def base_values(
        self, role: Role, matrix: table_1.Matrix | None, optimizer: OptimizerConfig
    ) -> Factors:
        """The proxy's values that the factors of a parameter multiply.

        optimizer: the section that holds them, or holds the section of the update rule.
        """
        section_name = self.section(role, matrix)
        section = getattr(optimizer, section_name) if section_name else optimizer
        return Factors(
            init_std=optimizer.base_init_std,
            lr=section.base_lr,
            weight_decay=section.base_weight_decay,
            eps=optimizer.base_eps,
        )

    def values(
        self,
        role: Role,
        width_ratio: float,
        optimizer: OptimizerConfig,
        matrix: table_1.Matrix | None = None,
    ) -> Factors:
        """Initial standard deviation, peak learning rate, weight decay and epsilon of a parameter.

        width_ratio, matrix: as of `factors`. optimizer: as of `base_values`.
        """
        factors = self.factors(role, width_ratio, matrix)
        base = self.base_values(role, matrix, optimizer)
        return Factors(
            init_std=factors.init_std * base.init_std,
            lr=factors.lr * base.lr,
            weight_decay=factors.weight_decay * base.weight_decay,
            eps=factors.eps * base.eps,
        )

    def section(self, role: Role, matrix: table_1.Matrix | None) -> str:
        """The section of the optimizer with the base values of a parameter, see `table.Row`."""
        return self._row(role, 1.0, matrix).section

    def _row(self, role: Role, width_ratio: float, matrix: table_1.Matrix | None) -> table_1.Row:
        ratio = width_ratio if self.scale_width else 1.0
        rows_of = table_1.RULES[self.rule]
        if not self.scale_width:
            rows_of = table_1.UNSCALED_RULES.get(self.rule, rows_of)
        multipliers = self.width_multiplier, self.depth_multiplier, self.alpha, ratio
        return rows_of(*multipliers, matrix, self.experts)[role]

    @property
    def _forward(self) -> table_1.Forward:
        base = table_1.Forward(self.base_residual_multiplier, self.base_logit_multiplier)
        return table_1.forward_factors(
            self.width_multiplier, self.depth_multiplier, self.alpha, base
        )


def table_of(config: Config) -> Table:
    """The table of a run, from the **global** model shape.

    A tensor shard or a pipeline stage never sees another m_N or m_L than the whole model.
    """
    model = config.model
    completep = config.completep
    scale_width = completep.parameterization != "sp"
    scale_depth = completep.parameterization == "completep"

    # Without the proxy's sizes the model is its own proxy: m_N = m_L = 1.
    base_hidden_size = completep.base_hidden_size or model.hidden_size
    base_num_layers = completep.base_num_layers or model.num_layers
    same_ratio = _ffn_of_same_ratio(model, base_hidden_size)
    base_expert_ffn = base_expert_ffn_hidden_size(model, completep)
    return Table(
        width_multiplier=model.hidden_size / base_hidden_size if scale_width else 1.0,
        depth_multiplier=model.num_layers / base_num_layers if scale_depth else 1.0,
        alpha=completep.alpha if scale_depth else 1.0,
        attention_scale=_attention_scale(model, completep.base_head_dim, scale_width),
        base_residual_multiplier=model.residual_multiplier,
        base_logit_multiplier=model.logit_multiplier,
        base_hidden_size=base_hidden_size,
        base_ffn_hidden_size=completep.base_ffn_hidden_size or same_ratio,
        base_expert_ffn_hidden_size=base_expert_ffn,
        experts=_expert_ratios(config, base_expert_ffn) if scale_width else table_1.NO_EXPERTS,
        rule=config.optimizer.type,
        scale_width=scale_width,
        batch=batch_scaling_of(config),
        decay=decay_rule_of(config),
        own_factors=MappingProxyType(dict(completep.factors)),
    )


def decay_rule_of(config: Config) -> DecayRule:
    """The rule of weight decay of a run."""
    optimizer = config.optimizer
    products = {"": optimizer.base_lr * optimizer.base_weight_decay}
    if optimizer.muon is not None:
        products["muon"] = optimizer.muon.base_lr * optimizer.muon.base_weight_decay
    return DecayRule(
        optimizer.weight_decay_rule,
        optimizer.target_tau,
        config.training.train_steps,
        MappingProxyType(products),
    )


def _expert_ratios(config: Config, base_ffn: int) -> table_1.ExpertRatios:
    """The experts over the proxy's; 1 and 1 without any."""
    moe = config.model.moe
    if moe is None:
        return table_1.NO_EXPERTS
    base_number = config.completep.base_num_experts or moe.num_experts
    return table_1.ExpertRatios(
        moe.num_experts / base_number, expert_ffn_hidden_size(config.model) / base_ffn
    )


def _ffn_of_same_ratio(model: ModelConfig, base_hidden_size: int) -> int:
    """The proxy's inner width of the MLP, where it is the same multiple of its hidden size."""
    return max(1, round(model.ffn_hidden_size * base_hidden_size / model.hidden_size))


def _attention_scale(model: ModelConfig, base_head_dim: int | None, scale_width: bool) -> float:
    """The factor on the attention logits: the model's own times that of `model.attention_scale`.

    Under SP the second is 1/sqrt(head_dim), whatever is configured.
    """
    rule = model.attention_scale if scale_width else "1/sqrt(head_dim)"
    size = head_dim(model)
    if rule == "1/head_dim":
        return model.attention_multiplier * (1 / size)
    if rule == "1/sqrt(head_dim)":
        return model.attention_multiplier * (1 / math.sqrt(size))

    return model.attention_multiplier * attention_scale(size, base_head_dim or size)


def attention_scale(head_dim: int, base_head_dim: int) -> float:
    """sqrt(base_head_dim) / head_dim, written so that at the base it is 1 / sqrt(head_dim)."""
    growth = math.sqrt(base_head_dim / head_dim)
    return growth / math.sqrt(head_dim)
