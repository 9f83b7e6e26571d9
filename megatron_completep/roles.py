"""The roles of parameters, in the order of the paper's Table 1. Schema and table both use them."""

from enum import StrEnum


class Role(StrEnum):
    """Rows of the table; QK-norm gains come from Complete(d)P (arXiv 2512.22382)."""

    EMBEDDING = "embedding"
    PRE_NORM = "pre_norm"
    HIDDEN_WEIGHT = "hidden_weight"
    HIDDEN_BIAS = "hidden_bias"
    FINAL_NORM = "final_norm"
    UNEMBEDDING = "unembedding"
    QK_NORM = "qk_norm"


# Gains start at 1 and biases at 0, set by the module that creates them; neither is drawn at random.
CONSTANT_ROLES = (Role.PRE_NORM, Role.HIDDEN_BIAS, Role.FINAL_NORM, Role.QK_NORM)
