"""The section of the optimizer for Muon."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_completep.config.section import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
)


class MuonConfig(Section):
    """Muon on the matrices of hidden weights; all other parameters are AdamW's."""

    base_lr: PositiveFloat = Field(
        description="Peak learning rate of the matrices at the proxy; an update of rate 1 has the "
        "spectral norm sqrt(d_out / d_in)."
    )
    base_weight_decay: NonNegativeFloat = Field(
        0.1, description="Weight decay of the matrices at the proxy, coupled to base_lr."
    )
    momentum: Fraction = Field(0.95, description="Decay rate of the running mean of gradients.")
    nesterov: bool = Field(
        True, description="Blend the gradient of the step into the mean once more."
    )
    iterations: PositiveInt = Field(5, description="Newton-Schulz iterations.")
    coefficients: Literal["quintic", "polar_express"] = Field(
        "polar_express",
        description="Of the iterations. quintic: Jordan's, the same in each; polar_express: "
        "another polynomial in each (arXiv 2505.16932), nearer to the orthogonal factor.",
    )
    parts: Literal["per_projection", "per_head"] = Field(
        "per_projection",
        description="What is one matrix of attention: each of q, k and v, or each head of them.",
    )
    precision: Literal["auto", "bf16", "master"] = Field(
        "auto",
        description="Type of the iterations and of the exchange; auto: bf16 where the hardware "
        "multiplies it, else that of the master weights.",
    )
    exchange_megabytes: PositiveFloat = Field(
        256.0,
        description="MB of matrices that a rank sends, and that it receives, before the next are "
        "sent; one matrix may be larger.",
    )
