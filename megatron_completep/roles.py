"""The roles of parameters, in the order of the paper's Table 1. Schema and table both use them."""

from enum import StrEnum


class Role(StrEnum):
    """Rows of the table; QK-norm gains come from Complete(d)P (arXiv 2512.22382).

    For what stands behind the rows of experts see docs/experts.md.
    """

    EMBEDDING = "embedding"
    PRE_NORM = "pre_norm"
    HIDDEN_WEIGHT = "hidden_weight"
    HIDDEN_BIAS = "hidden_bias"
    FINAL_NORM = "final_norm"
    UNEMBEDDING = "unembedding"
    QK_NORM = "qk_norm"
    ROUTER = "router"  # of a mixture of experts, as are the next three
    EXPERT_UP = "expert_up"
    EXPERT_DOWN = "expert_down"
    BALANCE_BIAS = "balance_bias"  # moved by the experts' loads, not by a gradient


# Gains start at 1 and biases at 0, set by the module that creates them; neither is drawn at random.
CONSTANT_ROLES = (
    Role.PRE_NORM,
    Role.HIDDEN_BIAS,
    Role.FINAL_NORM,
    Role.QK_NORM,
    Role.BALANCE_BIAS,
)
# What only a mixture of experts has.
EXPERT_ROLES = (Role.ROUTER, Role.EXPERT_UP, Role.EXPERT_DOWN, Role.BALANCE_BIAS)
# What has a fan-in and a decay inside of a layer.
LAYER_MATRICES = (Role.HIDDEN_WEIGHT, Role.ROUTER, Role.EXPERT_UP, Role.EXPERT_DOWN)
