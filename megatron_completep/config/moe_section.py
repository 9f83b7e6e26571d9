"""The section of the model for mixtures of experts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_completep.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class MoeConfig(Section):
    """Experts that share the tokens of a layer: each token goes to top_k of num_experts MLPs.

    No token is dropped. The activation is model.activation.
    """

    num_experts: PositiveInt = Field(description="Experts of a layer, E.")
    top_k: PositiveInt = Field(description="Experts that each token goes to, k.")
    ffn_hidden_size: PositiveInt | None = Field(
        None, description="Inner width of an expert; null: model.ffn_hidden_size."
    )
    shared_ffn_hidden_size: PositiveInt | None = Field(
        None,
        description="Inner width of an MLP for all tokens, beside the experts; null: there is "
        "none.",
    )
    gate: Literal["sigmoid", "softmax"] = Field(
        "sigmoid",
        description="Weight of a chosen expert. sigmoid: sigmoid(logit) / k; softmax: over the "
        "logits of the chosen, which add up to 1.",
    )
    every: PositiveInt = Field(
        1, description="One layer in so many has experts, from first_dense_layers on."
    )
    first_dense_layers: NonNegativeInt = Field(
        0, description="Layers at the beginning that have an MLP."
    )
    balance: Literal["bias", "loss", "none"] = Field(
        "bias",
        description="bias: a bias on the scores, for the choice alone, moves by the loads of the "
        "global batch (needs gate sigmoid); loss: balance_loss alone; none: nothing is balanced.",
    )
    bias_rate: PositiveFloat = Field(
        1e-3, description="What a balance bias moves by in a step; not scaled with the model."
    )
    balance_loss: NonNegativeFloat = Field(
        0.0,
        description="Coefficient of the balance loss of each sequence and layer at the proxy, "
        "scaled by m_L^-alpha; needed by balance loss, allowed beside a bias; 0: off.",
    )
    router_z_loss: NonNegativeFloat = Field(
        0.0,
        description="Coefficient of logsumexp^2 of the router's logits at the proxy, scaled by "
        "m_L^-alpha; 0: off.",
    )
