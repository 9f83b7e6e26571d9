"""The section of the configuration that says what the model reads."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_completep.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class TokenizerConfig(Section):
    """Turns text into token ids."""

    type: Literal["sentencepiece", "huggingface", "tiktoken", "bytes"] = Field(
        "sentencepiece", description="Tokenizer family."
    )
    model: str | None = Field(
        None, description="Model file or, for tiktoken, the encoding's name; not used by bytes."
    )
    prepend_bos: bool | None = Field(
        None,
        description="Whether a text begins with the beginning-of-text token; "
        "null: where the tokenizer itself puts one.",
    )
    eod_token: str | None = Field(
        None,
        description="The token that ends a document; null: the one that the tokenizer names.",
    )


class SourceConfig(Section):
    """One token file of a blend."""

    prefix: str = Field(description="Path of PREFIX.bin and PREFIX.idx, without the suffix.")
    weight: PositiveFloat | None = Field(
        None, description="Share of the samples, relative to the other sources; null: 1."
    )
    epochs: PositiveFloat | None = Field(
        None, description="Passes over this source in the whole run, instead of a weight."
    )


class DataConfig(Section):
    """What the model reads."""

    train: list[SourceConfig] = Field(min_length=1, description="Sources of the training blend.")
    validation: list[SourceConfig] | None = Field(
        None, description="Sources of the validation blend; null: no validation."
    )
    split: str | None = Field(
        None,
        description="'969,30,1': parts of the train sources for training, validation, test, "
        "when validation is null.",
    )
    tokenizer: TokenizerConfig | None = Field(
        None, description="Needed to decode text (generation, reports); training works without."
    )
    seed: NonNegativeInt = Field(1234, description="Seed of the sample order.")
    order: Literal["permutation", "megatron"] = Field(
        "permutation", description="permutation: O(1) seek; megatron: Megatron-Core's samples."
    )
    order_samples: PositiveInt | None = Field(
        None,
        description="Samples of training for which the order is planned (megatron; epochs beside "
        "weights); null: those of the run. Keeps the order of a run that is made longer.",
    )
    reset_at_document_ends: bool = Field(
        False, description="Attention and positions start anew at document boundaries."
    )
    mask_loss_at_document_ends: bool = Field(
        False,
        description="The first token of a document is no label: nothing before tells it. "
        "In training and validation; Megatron's --eod-mask-loss.",
    )
    prefetch: NonNegativeInt = Field(
        2, description="Steps of batches that a worker thread prepares ahead; 0: none."
    )
