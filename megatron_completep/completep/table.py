"""Table 1 of CompleteP (arXiv 2505.01618): the only place where a power of m_N or m_L is taken.

    m_N = N / N_base     width multiplier, of the residual stream
    m_L = L / L_base     depth multiplier
    r                    fan_in / base_fan_in of a matrix; it equals m_N if the FFN ratio is that
                         of the base model
    alpha                exponent of the residual multiplier, 0.5 to 1; CompleteP is 1

muP is this table with m_L = 1, SP with m_N = m_L = r = 1. Each entry multiplies the value tuned on
the proxy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_completep.roles import Role


@dataclass(frozen=True)
class Forward:
    """The factors of the forward pass."""

    branch: float  # x + branch * f(norm(x)), where f includes its bias
    unembedding: float  # logits = unembedding * x W^T


@dataclass(frozen=True)
class Row:
    """The factors of one role. An update rule reads only the columns it needs."""

    variance: float  # factor on the initial variance; 0 marks constants: gains are 1, biases 0
    lr: float
    weight_decay: float
    eps: float


def forward_factors(m_N: float, m_L: float, alpha: float, base: Forward) -> Forward:
    """The two forward-pass rows of the table, times `base`, the multipliers set for the proxy."""
    return Forward(
        branch=base.branch * m_L**-alpha,
        unembedding=base.unembedding / m_N,
    )


def adamw_rows(m_N: float, m_L: float, alpha: float, r: float) -> Mapping[Role, Row]:
    """The rows of the table that belong to AdamW. Gains and biases have no weight decay.

    QK_NORM is not in Table 1; it comes from Complete(d)P (arXiv 2512.22382). All heads share the
    gain, so its gradient is a sum over heads. The number of heads grows as m_N, which cancels the
    1 / m_N of each head's gradient: its epsilon has no 1 / m_N.
    """
    # fmt: off
    return {
        #                       variance  lr                       weight_decay  eps
        Role.EMBEDDING:     Row(1.0,      1.0,                     1.0,          1 / m_N),
        Role.PRE_NORM:      Row(0.0,      m_L ** (alpha - 1),      0.0,          m_L**-alpha / m_N),
        Role.HIDDEN_WEIGHT: Row(1 / r,    m_L ** (alpha - 1) / r,  r,            m_L**-alpha / m_N),
        Role.HIDDEN_BIAS:   Row(0.0,      m_L ** (alpha - 1),      0.0,          m_L**-alpha / m_N),
        Role.FINAL_NORM:    Row(0.0,      1.0,                     0.0,          1 / m_N),
        Role.UNEMBEDDING:   Row(1.0,      1.0,                     1.0,          1 / m_N),
        Role.QK_NORM:       Row(0.0,      m_L ** (alpha - 1),      0.0,          m_L**-alpha),
    }
    # fmt: on


# One function per update rule, keyed by the rule's name in `optim/rules.py`.
RULES: dict[str, Callable[[float, float, float, float], Mapping[Role, Row]]] = {"adamw": adamw_rows}
