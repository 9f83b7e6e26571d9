"""The section of the configuration that an export writes beside the weights."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_completep.config.section import PositiveInt, Section

TokenIdName = Literal["bos_token_id", "eos_token_id", "pad_token_id"]


class ExportConfig(Section):
    """What a Hugging Face folder says beside the weights; an import keeps the original's here."""

    architecture: Literal[
        "auto",
        "granite",
        "llama",
        "qwen3",
        "qwen2",
        "mistral",
        "granitemoe",
        "granitemoeshared",
        "mixtral",
        "gpt2",
    ] = Field("auto", description="Stock architecture; auto: what keeps or needs no multipliers.")
    max_position_embeddings: PositiveInt | None = Field(
        None, description="Longest sequence that config.json names; null: model.seq_length."
    )
    token_ids: dict[TokenIdName, Any] | None = Field(
        None,
        description="Entries of config.json on special tokens, each an id, a list of ids or null; "
        "null: those of the tokenizer. Generation ends at each eos_token_id.",
    )
    generation: dict[str, Any] | None = Field(
        None, description="Content of generation_config.json; null: the special tokens alone."
    )

    @field_validator("token_ids")
    @classmethod
    def _check_ids(cls, token_ids: dict[str, Any] | None) -> dict[str, Any] | None:
        for name, ids in (token_ids or {}).items():
            listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
            if not all(type(index) is int and index >= 0 for index in listed):
                raise ValueError(f"{name} must be an id, a list of ids, or null")
        return token_ids

    def end_tokens(self) -> list[int]:
        """The ids at which generation ends, beside the tokenizer's end of document."""
        ends: set[int] = set()
        for source in (self.token_ids or {}, self.generation or {}):
            ids = source.get("eos_token_id")
            listed = ids if isinstance(ids, list) else [ids]
            ends.update(index for index in listed if isinstance(index, int))
        return sorted(ends)
