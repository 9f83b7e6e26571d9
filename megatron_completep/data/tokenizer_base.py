"""What all families of tokenizers have in common, and what they read beside their model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_completep.data.files import printable, read_json, require_regular
from megatron_completep.data.indexed import dtype_for_vocabulary
from megatron_completep.errors import DataError

# Ids; a larger vocabulary is a damaged file, and would ask for its size in memory.
MAX_VOCABULARY = 1 << 24
SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character and decodes both to a space
# By which models know the token, in the order in which they are looked for.
END_OF_DOCUMENT_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eod>",
    "<EOD>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "[EOS]",
    "[SEP]",
)


IdArray = npt.NDArray[Any]  # token ids, 1-D


class TokenizerSettings(Protocol):
    """What `build_tokenizer` reads; `config.schema.TokenizerConfig` is one."""

    @property
    def type(self) -> str: ...
    @property
    def model(self) -> str | None: ...
    @property
    def prepend_bos(self) -> bool | None: ...
    @property
    def eod_token(self) -> str | None: ...


class Tokenizer:
    """Base of all families. Subclasses implement `_encode_batch` and `_decode`.

    type: the family's name. vocab_size: ids are in [0, vocab_size). eod_id: end-of-document id or
    None. bos_id: id of the beginning-of-text token or None. own_beginning: the ids that the
    tokenizer puts in front of a text by itself. own_ending: those that it would put behind one,
    which is left to --append-eod. beginning: those that it is to put in front, which `adopt`
    settles. hash: xxh3 (64 bits, hex) of the model's bytes. former_hashes: by which earlier
    versions knew the same tokenizer.
    """

    vocab_size: int
    eod_id: int | None
    hash: str
    bos_id: int | None = None
    own_beginning: tuple[int, ...] = ()
    own_ending: tuple[int, ...] = ()
    beginning: tuple[int, ...] = ()
    former_hashes: frozenset[str] = frozenset()
    model_name: str | None = None
    type: str = ""

    def adopt(self, settings: TokenizerSettings) -> None:
        """Take the user's choice of what begins and what ends a document.

        Raises DataError for a token that the tokenizer does not have.
        """
        if settings.eod_token is not None:
            self.eod_id = self._id_of(settings.eod_token)
            if self.eod_id is None:
                raise DataError(
                    f"end-of-document token {settings.eod_token!r} (--eod-token, "
                    f"data.tokenizer.eod_token): {self.type} tokenizer {self.model_name} has no "
                    "such token. Name one of its special tokens."
                )
            # A text that spells the token would seem to end there.
            if self.encode(settings.eod_token) == [self.eod_id]:
                raise DataError(
                    f"end-of-document token {settings.eod_token!r} (--eod-token, "
                    f"data.tokenizer.eod_token): {self.type} tokenizer {self.model_name} gives its "
                    f"id, {self.eod_id}, to texts that hold {settings.eod_token!r} as well. Name "
                    "one of its special tokens."
                )
        if settings.prepend_bos is None:
            self.beginning = self.own_beginning
        elif not settings.prepend_bos:
            self.beginning = ()
        else:
            self.beginning = self.own_beginning or self._named_beginning()

    def _named_beginning(self) -> tuple[int, ...]:
        """The beginning-of-text token. Raises DataError where the tokenizer has none."""
        if self.bos_id is None:
            raise DataError(
                f"{self.type} tokenizer {self.model_name} has no beginning-of-text token, so none "
                "can be put in front of a text (--prepend-bos, data.tokenizer.prepend_bos). "
                "Leave the setting out."
            )
        return (self.bos_id,)

    @property
    def context(self) -> list[int]:
        """What stands before the first token of a text: the beginning, else the end before it.

        Raises DataError where the tokenizer has neither.
        """
        if self.beginning:
            return list(self.beginning)
        if self.eod_id is None:
            raise DataError(
                "the tokenizer has no end-of-document token, after which a text could begin. Use "
                "one that has, or name it (data.tokenizer.eod_token)."
            )
        return [self.eod_id]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the ids that `encode_batch` returns, the one that token files store."""
        return dtype_for_vocabulary(self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without what begins or ends a document."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[IdArray]:
        """Token ids of each text, one array of `dtype` a text.

        Raises DataError for text that UTF-8 cannot express (lone surrogates).
        """
        # Each library would fail in its own way, or replace what it cannot express.
        try:
            for document in texts:
                if not document.isascii():
                    document.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"text holds the lone surrogate {error.object[error.start]!r}, "
                "which UTF-8 cannot express. Repair the text first."
            ) from error
        return self._encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids. Raises DataError for an id outside [0, vocab_size)."""
        integers = [int(i) for i in ids]
        for position, i in enumerate(integers):
            if not 0 <= i < self.vocab_size:
                raise DataError(
                    f"token id {i} at position {position} is outside "
                    f"the tokenizer's vocabulary of {self.vocab_size}."
                )
        return self._decode(integers)

    def is_recorded_in(self, recorded: Mapping[str, Any]) -> bool:
        """Whether this is the tokenizer of a record that `identity` made; True for none."""
        return recorded.get("hash") in (None, self.hash, *self.former_hashes)

    def identity(self) -> dict[str, str | int | None]:
        """What is recorded beside token files; tokenizers with equal identities give equal ids."""
        return {
            "type": self.type,
            "model": self.model_name,
            "hash": self.hash,
            "vocab_size": self.vocab_size,
            "eod_id": self.eod_id,
        }

    def _id_of(self, name: str) -> int | None:
        """The id of a special token; None where there is none of this name."""
        return None

    def _encode_batch(self, texts: Sequence[str]) -> list[IdArray]:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError


def read_model(path: str, family: str) -> bytes:
    try:
        require_regular(path)
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            f"{printable(path)}: the {family} tokenizer's model cannot be read "
            f"({error.strerror}). Give its file."
        ) from error


def read_companion(path: Path) -> dict[str, Any]:
    """The object in a JSON file beside a model; empty where there is none. Raises DataError."""
    if not path.exists():
        return {}
    try:
        content = read_json(path)
    except ValueError as error:
        raise DataError(f"{path}: not a JSON object ({error}).") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object. Restore the file.")
    return content


def token_named(companion: Mapping[str, Any], key: str) -> str | None:
    """The text of a token such as `bos_token` in a tokenizer_config.json; None for none."""
    token = companion.get(key)
    # Either the token's text, or an object that describes it.
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
