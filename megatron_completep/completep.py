"""Table 1 of CompleteP (arXiv 2505.01618) as one page of code.

This is the only place where a power of the width multiplier m_N or the depth multiplier m_L is taken; everything else
receives plain floats. It knows roles, never modules or parameter names, and needs neither torch nor the trainer:

    table = Table(width_multiplier=4.0, depth_multiplier=8.0)
    table.factors(Role.HIDDEN_WEIGHT, width_ratio=4.0)      # Factors(init_std=0.5, lr=0.25, weight_decay=4.0, eps=0.03125)
    table.residual_multiplier                               # 0.125
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from megatron_completep.config.schema import CompletePConfig, ModelConfig, OptimizerConfig, RoleFactors
from megatron_completep.errors import ConfigError


class Role(StrEnum):
    """What a parameter is, in the row order of the paper's Table 1; QK-norm gains come from Complete(d)P (arXiv 2512.22382)."""

    EMBEDDING = "embedding"
    PRE_NORM = "pre_norm"
    HIDDEN_WEIGHT = "hidden_weight"
    HIDDEN_BIAS = "hidden_bias"
    FINAL_NORM = "final_norm"
    UNEMBEDDING = "unembedding"
    QK_NORM = "qk_norm"


@dataclass(frozen=True)
class Factors:
    """What multiplies the proxy's base values; also used for the final values themselves."""

    init_std: float
    lr: float
    weight_decay: float
    eps: float


def table_1(m_N: float, m_L: float, alpha: float, width_ratio: float) -> dict[Role, Factors]:
    """The table. muP is m_L = 1, SP is m_N = m_L = 1.

    `width_ratio` is fan_in / base_fan_in of the matrix at hand (m_N wherever the FFN ratio is the base's); eps follows the
    global m_N. Gains start at 1 and biases at 0 (init_std 0 here), and neither is decayed.
    """
    depth = m_L ** (alpha - 1)
    eps = 1 / m_N
    block_eps = m_L**-alpha / m_N
    return {
        #                            init_std            lr                   weight_decay  eps
        Role.EMBEDDING: Factors(1.0, 1.0, 1.0, eps),
        Role.PRE_NORM: Factors(0.0, depth, 0.0, block_eps),
        Role.HIDDEN_WEIGHT: Factors(width_ratio**-0.5, depth / width_ratio, width_ratio, block_eps),
        Role.HIDDEN_BIAS: Factors(0.0, depth, 0.0, block_eps),
        Role.FINAL_NORM: Factors(0.0, 1.0, 0.0, eps),
        Role.UNEMBEDDING: Factors(1.0, 1.0, 1.0, eps),
        Role.QK_NORM: Factors(0.0, depth, 0.0, m_L**-alpha),
    }


@dataclass(frozen=True)
class Table:
    """The parameterization of one run: forward multipliers, and factors by role. Frozen; built once, from the global shape."""

    width_multiplier: float = 1.0
    depth_multiplier: float = 1.0
    alpha: float = 1.0
    attention_scale: float = 1.0
    base_residual_multiplier: float = 1.0
    base_logit_multiplier: float = 1.0
    base_hidden_size: int | None = None
    base_ffn_hidden_size: int | None = None
    scale_width: bool = True  # False under SP, where a matrix's own ratio does not count either
    batch_ratio: float = 1.0  # m_B
    duration_ratio: float = 1.0  # m_D
    batch_exponent: float = 0.5
    own_factors: Mapping[str, RoleFactors] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def residual_multiplier(self) -> float:
        """m_L^-alpha (times the tunable base factor): multiplies each branch's output, bias included, before the residual sum."""
        return self.base_residual_multiplier * float(self.depth_multiplier**-self.alpha)

    @property
    def logit_multiplier(self) -> float:
        """1 / m_N (times the tunable base factor): multiplies the logits, in training, evaluation and generation."""
        return self.base_logit_multiplier / self.width_multiplier

    @property
    def batch_scale(self) -> float:
        """S of Complete(d)P: sqrt(m_B / m_D) at the default exponent. ConfigError where it is no positive number."""
        try:
            scale = float((self.batch_ratio / self.duration_ratio) ** self.batch_exponent)
        except (OverflowError, ZeroDivisionError):
            scale = math.inf
        if not 0 < scale < math.inf:
            raise ConfigError(
                f"completep.batch_exponent = {self.batch_exponent:g}: S = (m_B / m_D)^exponent with m_B = {self.batch_ratio:g} and "
                f"m_D = {self.duration_ratio:g} is no positive number. Use an exponent such as 0.5, or check "
                "completep.base_batch_tokens and base_total_tokens (in tokens)."
            )
        return scale

    def factors(self, role: Role, width_ratio: float = 1.0) -> Factors:
        """Factors of one parameter; `width_ratio` is fan_in / base_fan_in of the logical matrix (1 for vectors)."""
        row = table_1(self.width_multiplier, self.depth_multiplier, self.alpha, width_ratio if self.scale_width else 1.0)[role]
        own, scale = self.own_factors.get(role.value, RoleFactors()), self.batch_scale
        return Factors(
            init_std=row.init_std * own.init_std,
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

    def betas(self, base: tuple[float, float]) -> tuple[float, float]:
        """1 - beta scales with m_B / m_D, so that the averages last equally many tokens of the base run."""
        ratio = self.batch_ratio / self.duration_ratio
        if ratio == 1.0:
            return base
        scaled = 1 - (1 - base[0]) * ratio, 1 - (1 - base[1]) * ratio
        if min(scaled) < 0:
            raise ConfigError(
                f"optimizer.betas = {list(base)}: scaled by m_B / m_D = {ratio:g} they become {scaled[0]:g} and {scaled[1]:g}, below 0. "
                "Train longer or with a smaller batch, or check completep.base_batch_tokens and base_total_tokens (in tokens)."
            )
        return scaled


def table_for(model: ModelConfig, completep: CompletePConfig, batch_tokens: int | None = None, total_tokens: int | None = None) -> Table:
    """The table of a run, from the **global** model shape: a shard or a stage can never see another m_N or m_L.

    `batch_tokens` (tokens a step) and `total_tokens` (of the run) count only where the base run's are configured.
    """
    scale_width = completep.parameterization != "sp"
    scale_depth = completep.parameterization == "completep"
    base_hidden_size = completep.base_hidden_size or model.hidden_size
    base_num_layers = completep.base_num_layers or model.num_layers
    width_multiplier = model.hidden_size / base_hidden_size if scale_width else 1.0
    head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
    base_head_dim = completep.base_head_dim or head_dim
    ratios = (batch_tokens, completep.base_batch_tokens), (total_tokens, completep.base_total_tokens)
    batch_ratio, duration_ratio = (now / base if now and base else 1.0 for now, base in ratios)
    return Table(
        width_multiplier=width_multiplier,
        depth_multiplier=model.num_layers / base_num_layers if scale_depth else 1.0,
        alpha=completep.alpha if scale_depth else 1.0,
        attention_scale=model.attention_multiplier
        * _attention_scale(model.attention_scale if scale_width else "1/sqrt(head_dim)", head_dim, base_head_dim),
        base_residual_multiplier=model.residual_multiplier,
        base_logit_multiplier=model.logit_multiplier,
        base_hidden_size=base_hidden_size,
        base_ffn_hidden_size=completep.base_ffn_hidden_size or max(1, round(model.ffn_hidden_size * base_hidden_size / model.hidden_size)),
        scale_width=scale_width,
        batch_ratio=batch_ratio,
        duration_ratio=duration_ratio,
        batch_exponent=completep.batch_exponent,
        own_factors=MappingProxyType({str(role): factors for role, factors in completep.factors.items()}),
    )


def _attention_scale(rule: str, head_dim: int, base_head_dim: int) -> float:
    if rule == "1/head_dim":
        return 1 / head_dim
    if rule == "1/sqrt(head_dim)":
        return 1 / math.sqrt(head_dim)
    return math.sqrt(base_head_dim / head_dim) / math.sqrt(head_dim)  # sqrt(base_head_dim) / head_dim; at the base SP's to the last bit


@dataclass(frozen=True)
class Declaration:
    """What a module says of a parameter where it creates it."""

    role: Role
    width_ratio: float = 1.0  # fan_in / base_fan_in of the logical matrix


def declare(parameter: Any, role: Role, fan_in: int | None = None, base_fan_in: int | None = None) -> Any:
    """Attach a role, and for matrices the logical fan-in and the proxy's, to a parameter; returns the parameter.

    A fused matrix (QKV, gate and up) declares the fan-in of one of its parts; a tensor-parallel shard declares the global one.
    """
    ratio = 1.0 if fan_in is None or base_fan_in is None else fan_in / base_fan_in
    parameter.completep = Declaration(role, ratio)
    return parameter


def declaration_of(name: str, parameter: Any) -> Declaration:
    """The declaration of a parameter; one without a role is an error, never a guess."""
    declaration = getattr(parameter, "completep", None)
    if not isinstance(declaration, Declaration):
        roles = ", ".join(Role)
        raise ConfigError(f"parameter {name} declares no CompleteP role. Call completep.declare(parameter, role) with one of: {roles}.")
    return declaration
