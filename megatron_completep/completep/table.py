"""Table 1 of CompleteP (arXiv 2505.01618): the only place where a power of m_N or m_L is taken.

    m_N = N / N_base     width multiplier, of the residual stream
    m_L = L / L_base     depth multiplier
    r                    fan_in / base_fan_in of a matrix; it equals m_N if the FFN ratio is that
                         of the base model
    alpha                exponent of the residual multiplier, 0.5 to 1; CompleteP is 1

muP is this table with m_L = 1, SP with m_N = m_L = r = 1. Each entry multiplies the value tuned on
the proxy.

An update rule that has other learning rates than AdamW has rows of its own (arXiv 2512.05620 for
Muon's). What a row decays in a step is its learning rate times its weight decay, in every rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_completep.roles import Role


@dataclass(frozen=True)
class Forward:
    """The factors of the forward pass."""

    branch: float  # x + branch * f(norm(x)), where f includes its bias
    unembedding: float  # logits = unembedding * x W^T
    router_losses: float = 1.0  # on the coefficients of the losses that a router has of its own


@dataclass(frozen=True)
class Row:
    """The factors of one role. An update rule reads only the columns it needs."""

    variance: float  # factor on the initial variance; 0 marks constants: gains are 1, biases 0
    lr: float
    weight_decay: float
    eps: float
    # The section of the configuration's optimizer whose base_lr and base_weight_decay these
    # multiply; empty: the optimizer's own.
    section: str = ""


class ExpertRatios(NamedTuple):
    """A mixture of experts over that of the proxy.

    number: e, of experts. width: of an expert's inner width; it is m_N if experts keep their shape.
    """

    number: float = 1.0
    width: float = 1.0


Matrix = tuple[int, int]  # d_out, d_in of a logical matrix
Rows = Callable[[float, float, float, float, Matrix | None, ExpertRatios], Mapping[Role, Row]]
NO_EXPERTS = ExpertRatios()


def forward_factors(m_N: float, m_L: float, alpha: float, base: Forward) -> Forward:
    """The forward-pass rows of the table, times `base`, the multipliers set for the proxy.

    The gradient that reaches a router from the tokens' loss has passed its branch's m_L^-alpha;
    that of a router's own loss has not, and takes it from its coefficient. Width, k and E have no
    factor there (docs/experts.md).
    """
    return Forward(
        branch=base.branch * m_L**-alpha,
        unembedding=base.unembedding / m_N,
        router_losses=base.router_losses * m_L**-alpha,
    )


def adamw_rows(
    m_N: float,
    m_L: float,
    alpha: float,
    r: float,
    _: Matrix | None = None,
    experts: ExpertRatios = NO_EXPERTS,
) -> Mapping[Role, Row]:
    """The rows of the table that belong to AdamW. Gains and biases have no weight decay.

    QK_NORM is not in Table 1; it comes from Complete(d)P (arXiv 2512.22382). All heads share the
    gain, so its gradient is a sum over heads. The number of heads grows as m_N, which cancels the
    1 / m_N of each head's gradient: its epsilon has no 1 / m_N.

    Experts (arXiv 2601.20205, 2605.14200): matrices like any other, of which a token sees the share
    k / E with the weight 1 / k, so that gradients fall as 1 / E. The router's has no power of m_N.
    A balance bias takes steps of a constant size (optim/balance.py), which nothing here scales.
    """
    d = m_L ** (alpha - 1)
    branch = m_L**-alpha / experts.number  # what scales the gradients of experts
    up_eps = branch / experts.width
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
        Role.ROUTER:        Row(r**-2,    d / r,                   r,            branch),
        Role.EXPERT_UP:     Row(1 / r,    d / r,                   r,            up_eps),
        Role.EXPERT_DOWN:   Row(m_N / r**2, d / r,                 r,            branch / m_N),
        Role.BALANCE_BIAS:  Row(0.0,      1.0,                     0.0,          1.0),  # see above
    }
    # fmt: on


def muon_rows(
    m_N: float,
    m_L: float,
    alpha: float,
    r: float,
    matrix: Matrix | None,
    experts: ExpertRatios = NO_EXPERTS,
) -> Mapping[Role, Row]:
    """Muon's rows, after arXiv 2512.05620: its own for matrices of hidden weights, else AdamW's.

    An orthogonal update has the spectral norm 1 whatever the gradient's size is, so that no epsilon
    and no power of m_N for the gradient is left. sqrt(d_out / d_in) makes it change the RMS of the
    output by O(1) of the RMS of the input. It is absolute, and no ratio to the proxy: one base
    value serves matrices of all shapes. Decay has nothing to do with it: the factor is taken out
    again, so that all matrices decay alike.

    matrix: of the logical part at hand; None: not a matrix, which is AdamW's.
    """
    rows = adamw_rows(m_N, m_L, alpha, r, experts=experts)
    if matrix is None:
        return rows
    d_out, d_in = matrix
    spectral = math.sqrt(d_out / d_in)
    hidden_weight = Row(
        variance=rows[Role.HIDDEN_WEIGHT].variance,
        lr=spectral * m_L ** (alpha - 1),
        weight_decay=1 / spectral,
        eps=0.0,
        section="muon",
    )
    return {**rows, Role.HIDDEN_WEIGHT: hidden_weight}


def moonlight_rows(
    m_N: float,
    m_L: float,
    alpha: float,
    r: float,
    matrix: Matrix | None,
    experts: ExpertRatios = NO_EXPERTS,
) -> Mapping[Role, Row]:
    """Muon without a width rule, for comparison: the factor of Moonlight (arXiv 2502.16982).

    .2 sqrt(max(d_out, d_in)) gives updates the RMS that AdamW's have. Their effect grows with the
    width, as AdamW's does under SP.
    """
    rows = muon_rows(m_N, m_L, alpha, r, matrix, experts)
    if matrix is None:
        return rows
    factor = 0.2 * math.sqrt(max(matrix))
    hidden_weight = replace(rows[Role.HIDDEN_WEIGHT], lr=factor, weight_decay=1 / factor)
    return {**rows, Role.HIDDEN_WEIGHT: hidden_weight}


# One function per update rule, keyed by the rule's name in `optimizer.type` and `optim/rules.py`.
RULES: dict[str, Rows] = {"adamw": adamw_rows, "muon": muon_rows}
# Under SP, where these are not the rows above at m_N = m_L = r = 1.
UNSCALED_RULES: dict[str, Rows] = {"muon": moonlight_rows}
