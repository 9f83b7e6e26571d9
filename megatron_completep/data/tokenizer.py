"""Text to token ids and back: four families of tokenizers behind one interface.

Each library is imported only when its type is asked for. Text never turns into special tokens: a
document that contains the characters `<|endoftext|>` is encoded as those characters. Special tokens
(beginning of text and end of document included) decode to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from megatron_completep.data.files import printable
from megatron_completep.data.huggingface_tokenizer import HuggingFaceTokenizer

# Written `X as X` where other rooms take the name from here.
from megatron_completep.data.sentencepiece_tokenizer import (
    SentencePieceTokenizer as SentencePieceTokenizer,
)
from megatron_completep.data.tiktoken_tokenizer import TIKTOKEN_ENCODINGS
from megatron_completep.data.tiktoken_tokenizer import TiktokenTokenizer as TiktokenTokenizer
from megatron_completep.data.tokenizer_base import SPACE_MARK as SPACE_MARK
from megatron_completep.data.tokenizer_base import IdArray as IdArray
from megatron_completep.data.tokenizer_base import Tokenizer as Tokenizer
from megatron_completep.data.tokenizer_base import TokenizerSettings as TokenizerSettings
from megatron_completep.data.tokenizer_base import read_model
from megatron_completep.errors import DataError


class BytesTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, end of document 256. Needs no model."""

    type = "bytes"
    vocab_size = 257
    eod_id = 256
    hash = xxhash.xxh3_64_hexdigest(b"bytes, end of document 256")

    def _encode_batch(self, texts: Sequence[str]) -> list[IdArray]:
        contents = [document.encode() for document in texts]
        return [np.frombuffer(content, np.uint8).astype(self.dtype) for content in contents]

    def _decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


_FAMILIES: dict[str, Callable[[str], Tokenizer]] = {
    "sentencepiece": SentencePieceTokenizer,
    "huggingface": HuggingFaceTokenizer,
    "tiktoken": TiktokenTokenizer,
}


def build_tokenizer(config: TokenizerSettings) -> Tokenizer:
    """The tokenizer that `config.type` and `config.model` name.

    Raises DataError for an unknown type or an unusable model.
    """
    tokenizer = _build_family(config)
    tokenizer.adopt(config)
    return tokenizer


def _build_family(config: TokenizerSettings) -> Tokenizer:
    """The tokenizer as its model has it."""
    if config.type == "bytes":
        return BytesTokenizer()
    if config.type not in _FAMILIES:
        families = ", ".join(sorted([*_FAMILIES, "bytes"]))
        raise DataError(f"tokenizer type = {config.type!r} is unknown. Use one of: {families}.")
    if config.model is None:
        raise DataError(
            f"tokenizer type {config.type} needs a model: its file, or for tiktoken "
            "the encoding's name (--tokenizer-model, data.tokenizer.model)."
        )
    return _FAMILIES[config.type](config.model)


def model_path(settings: TokenizerSettings) -> str:
    """The path in a tokenizer's model.

    tiktoken's may have the encoding's name before it, or be nothing but that name.
    """
    model = str(settings.model)
    return model.rpartition(":")[2] if settings.type == "tiktoken" else model


def lasting_model(settings: TokenizerSettings) -> str | None:
    """A tokenizer's model as it can be named from any folder: a file by its absolute path."""
    path = model_path(settings)
    if settings.model is None or not os.path.exists(path):
        return settings.model
    encoding = settings.model.removesuffix(path)
    return printable(encoding + os.path.abspath(path))


def guess_type(model: str) -> str:
    """The family of a model by its name, or by its content where that says nothing."""
    path = Path(model.rpartition(":")[2])
    if model in TIKTOKEN_ENCODINGS or path.suffix == ".tiktoken":
        return "tiktoken"
    if path.is_dir() or path.suffix == ".json":
        return "huggingface"
    if path.suffix == ".model":
        return "sentencepiece"
    begins_as_json = read_model(model, "named")[:1].lstrip() == b"{"
    return "huggingface" if begins_as_json else "sentencepiece"
