"""Table 1 of CompleteP (arXiv 2505.01618): the one place where a power of m_N or m_L is taken.

    m_N = N / N_base     width multiplier, of the residual stream
    m_L = L / L_base     depth multiplier
    r                    fan_in / base_fan_in of a matrix: m_N where the FFN ratio is the base's
    alpha                exponent of the residual multiplier, 0.5 to 1; CompleteP is 1

muP is the page at m_L = 1, SP at m_N = m_L = r = 1. An entry multiplies the value that was tuned at
the proxy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_completep.roles import Role


@dataclass(frozen=True)
class Forward:
    """The factors of the forward pass."""

    residual: float  # on a branch's output, bias included: x + residual * f(norm(x))
    unembedding: float  # on the logits: unembedding * x W^T


@dataclass(frozen=True)
class Row:
    """The factors of one role. An update rule reads the columns that it has a use for."""

    variance: float  # of the initial weights; 0: a gain that starts at 1 or a bias that starts at 0
    lr: float
    weight_decay: float
    eps: float


def forward(m_N: float, m_L: float, alpha: float, base: Forward) -> Forward:
    """The two rows of the table that act in the forward pass, times the proxy's own factors."""
    return Forward(
        residual=base.residual * m_L**-alpha,
        unembedding=base.unembedding / m_N,
    )


def adamw(m_N: float, m_L: float, alpha: float, r: float) -> Mapping[Role, Row]:
    """The rows of the table that belong to AdamW. Neither gains nor biases are decayed."""
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


# One function an update rule, under the rule's name in `optim/rules.py`.
RULES: dict[str, Callable[[float, float, float, float], Mapping[Role, Row]]] = {"adamw": adamw}
