"""The section of the configuration that says how rotary frequencies are rescaled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from megatron_completep.config.section import PositiveFloat, PositiveInt, Section

if TYPE_CHECKING:
    from megatron_completep.config.schema import ModelConfig

# Beside `rope_type` and `factor`: what each kind needs, and what it may have.
_NEEDED = {
    "linear": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position_embeddings",),
}
_OPTIONAL = {
    "linear": (),
    "llama3": (),
    "yarn": (
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


class RopeScalingConfig(Section):
    """Rescaled rotary frequencies, with the names and meanings of Hugging Face's rope_scaling."""

    rope_type: Literal["linear", "llama3", "yarn"] = Field(
        description="linear: all frequencies divided by factor; llama3: the low ones alone; "
        "yarn: ramp between both, and sharper attention."
    )
    factor: PositiveFloat = Field(description="What low frequencies are divided by.")
    original_max_position_embeddings: PositiveInt | None = Field(
        None, description="llama3, yarn: longest sequence before frequencies were rescaled."
    )
    low_freq_factor: PositiveFloat | None = Field(
        None, description="llama3: wavelengths above original length / this are divided."
    )
    high_freq_factor: PositiveFloat | None = Field(
        None, description="llama3: wavelengths below original length / this stay."
    )
    attention_factor: PositiveFloat | None = Field(
        None, description="yarn: multiplies cos and sin; null: 0.1 ln(factor) + 1, or by mscale."
    )
    beta_fast: PositiveFloat | None = Field(
        None, description="yarn: frequencies with more turns in the original length stay; null: 32."
    )
    beta_slow: PositiveFloat | None = Field(
        None, description="yarn: frequencies with fewer turns are divided; null: 1."
    )
    mscale: PositiveFloat | None = Field(
        None, description="yarn: with mscale_all_dim, their ratio gives the attention factor."
    )
    mscale_all_dim: PositiveFloat | None = Field(None, description="yarn: see mscale.")
    truncate: bool | None = Field(
        None, description="yarn: bounds of the ramp are whole numbers; null: true."
    )

    def given(self) -> dict[str, object]:
        """The entries that are set, as config.json has them."""
        return self.model_dump(exclude_none=True)


def rope_problems(model: ModelConfig) -> Iterator[str]:
    """Everything about `model.rope_scaling` that has no meaning, with a remedy."""
    scaling = model.rope_scaling
    if scaling is None:
        return
    where = "model.rope_scaling"
    kind = scaling.rope_type
    if model.position != "rope":
        yield (
            f"{where} rescales rotary frequencies, which model.position = {model.position} does "
            "not have. Leave it null."
        )
    given = scaling.given()
    missing = [name for name in _NEEDED[kind] if name not in given]
    if missing:
        yield f"{where}.rope_type = {kind} needs {', '.join(missing)}. Set them."
    known = {"rope_type", "factor", *_NEEDED[kind], *_OPTIONAL[kind]}
    unknown = [name for name in given if name not in known]
    if unknown:
        yield f"{where}.rope_type = {kind} does not read {', '.join(unknown)}. Remove them."
    low = scaling.low_freq_factor
    high = scaling.high_freq_factor
    if kind == "llama3" and low is not None and high is not None and low >= high:
        yield (
            f"{where}: low_freq_factor = {low:g} is not below high_freq_factor = {high:g}. "
            "Lower the first."
        )
    if kind == "yarn" and model.rope_base == 1:
        yield f"{where}.rope_type = yarn needs frequencies that differ: model.rope_base above 1."
    if kind == "yarn" and (scaling.beta_fast or 32) < (scaling.beta_slow or 1):
        yield (
            f"{where}: beta_fast = {scaling.beta_fast or 32:g} is below beta_slow = "
            f"{scaling.beta_slow or 1:g}. Raise the first."
        )
