"""Hugging Face's tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from megatron_completep.data.files import printable
from megatron_completep.data.tokenizer_base import (
    END_OF_DOCUMENT_NAMES,
    MAX_VOCABULARY,
    IdArray,
    Tokenizer,
    read_companion,
    read_model,
    token_named,
)
from megatron_completep.errors import DataError


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` file, or a folder with one.

    A `tokenizer_config.json` beside it may name the tokens that begin and end a document; whether
    a text is begun with one says the file's own template (post_processor), as in transformers 5.
    """

    type = "huggingface"

    def __init__(self, model: str):
        import tokenizers

        path = Path(model) / "tokenizer.json" if Path(model).is_dir() else Path(model)
        content = read_model(str(path), "huggingface")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path}: not a Hugging Face tokenizer.json ({error}).") from error
        # The file may ask for these; a corpus holds each text as it is, and names stay text.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self.model_name = printable(path.name)
        self.hash = xxhash.xxh3_64_hexdigest(content)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{path}: its vocabulary is empty. Give a tokenizer that was trained.")
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have holes
        if self.vocab_size > MAX_VOCABULARY:
            raise DataError(
                f"{path}: holds the id {self.vocab_size - 1}; ids go up to {MAX_VOCABULARY - 1}."
            )
        self._vocabulary = vocabulary
        folder = path.parent
        beside = read_companion(folder / "tokenizer_config.json")
        special = read_companion(folder / "special_tokens_map.json")
        named_end = token_named(beside, "eos_token") or token_named(special, "eos_token")
        names = [] if named_end is None else [named_end]
        ids = (self._id_of(name) for name in (*names, *END_OF_DOCUMENT_NAMES))
        self.eod_id = next((index for index in ids if index is not None), None)
        self.own_beginning, self.own_ending = self._template()
        name = token_named(beside, "bos_token") or token_named(special, "bos_token")
        if name is not None:
            self.bos_id = self._id_of(name)
        elif self.own_beginning:
            self.bos_id = self.own_beginning[0]

    def _id_of(self, name: str) -> int | None:
        return self._vocabulary.get(name)

    def _template(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the file's template puts in front of a text, and those behind it."""
        probe = "a"
        try:
            plain = self._tokenizer.encode(probe, add_special_tokens=False).ids
            framed = self._tokenizer.encode(probe, add_special_tokens=True).ids
        except Exception:  # the library's bare one: a vocabulary that cannot express the probe
            return (), ()
        # The text's own ids stand in the middle of what the template makes.
        for length in range(len(framed) - len(plain) + 1):
            end = length + len(plain)
            if framed[length:end] == plain:
                return tuple(framed[:length]), tuple(framed[end:])
        return (), ()

    def _encode_batch(self, texts: Sequence[str]) -> list[IdArray]:
        # encode_batch_fast leaves out character offsets, which nobody here reads.
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        # The library raises a bare Exception for text that the vocabulary cannot express.
        except Exception as error:
            raise DataError(
                f"{self.model_name}: a text cannot be encoded ({error}). Use another tokenizer."
            ) from error
        arrays = []
        for encoding in encodings:
            ids = encoding.ids  # a new list at every access
            arrays.append(np.fromiter(ids, self.dtype, len(ids)))
        return arrays

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
