"""SentencePiece models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from megatron_completep.data.files import printable
from megatron_completep.data.tokenizer_base import (
    END_OF_DOCUMENT_NAMES,
    SPACE_MARK,
    IdArray,
    Tokenizer,
    read_companion,
    read_model,
)
from megatron_completep.errors import DataError


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file.

    SentencePiece's own code turns the character U+2581 into a space. For a model that is lossless
    otherwise (identity normalization, byte fallback, no dummy prefix: what tools/train_tokenizer.py
    makes) that character is encoded as its three bytes instead. With a dummy prefix the parts of a
    text around it would get a space each, so it is left to the library.
    """

    type = "sentencepiece"

    def __init__(self, model: str):
        import sentencepiece

        content = read_model(model, "sentencepiece")
        self.content = content
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(f"{model}: not a SentencePiece model ({error}).") from error
        self.model_name = printable(Path(model).name)
        self.hash = xxhash.xxh3_64_hexdigest(content)
        self.vocab_size = self._processor.get_piece_size()
        self.eod_id = self._find_end_of_document()
        self._space_mark_ids = self._find_space_mark()
        if self._processor.bos_id() >= 0:
            self.bos_id = int(self._processor.bos_id())
            # The library leaves it to the caller; Llama 2's folder says that its callers put it.
            beside = read_companion(Path(model).parent / "tokenizer_config.json")
            if beside.get("add_bos_token") is True:
                self.own_beginning = (self.bos_id,)

    def _id_of(self, name: str) -> int | None:
        index = int(self._processor.piece_to_id(name))
        # A name that the model does not know has the id of the unknown token.
        return None if index == self._processor.unk_id() else index

    def _find_end_of_document(self) -> int | None:
        if self._processor.eos_id() >= 0:
            return int(self._processor.eos_id())
        indices = (self._id_of(name) for name in END_OF_DOCUMENT_NAMES)
        return next((index for index in indices if index is not None), None)

    def _find_space_mark(self) -> list[int] | None:
        """The ids of U+2581's three bytes; None where the model is not lossless otherwise."""
        byte_names = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
        ids = [self._processor.piece_to_id(name) for name in byte_names]
        probe = "  a \n\tb "
        keeps_spaces = self._processor.decode(self._processor.encode(probe)) == probe
        has_bytes = all(self._processor.is_byte(i) for i in ids)
        adds_nothing = "".join(self._processor.encode("a", out_type=str)) == "a"
        return ids if keeps_spaces and has_bytes and adds_nothing else None

    def _encode_batch(self, texts: Sequence[str]) -> list[IdArray]:
        # The library takes a batch faster than one text after the other, and few texts are marked.
        arrays: list[IdArray | None] = []
        plain_texts = []
        for document in texts:
            if self._space_mark_ids is not None and SPACE_MARK in document:
                arrays.append(self._encode_marked(document))
            else:
                arrays.append(None)
                plain_texts.append(document)
        plain_arrays = iter(self._encode_plain(plain_texts))
        return [next(plain_arrays) if array is None else array for array in arrays]

    def _encode_plain(self, texts: list[str]) -> list[IdArray]:
        # Only recent versions have it; without Python lists it is 8 % faster.
        if hasattr(self._processor, "EncodeAsNumpy"):
            arrays = self._processor.EncodeAsNumpy(texts, num_threads=1)
            return [array.astype(self.dtype) for array in arrays]
        id_lists = self._processor.encode(texts, num_threads=1)
        return [np.array(ids, self.dtype) for ids in id_lists]

    def _encode_marked(self, text: str) -> IdArray:
        """Token ids of a text with U+2581 in it, whose bytes stand between what lies around it."""
        assert self._space_mark_ids is not None
        joined: list[int] = []
        for number, ids in enumerate(self._encode_plain(text.split(SPACE_MARK))):
            if number:
                joined += self._space_mark_ids
            joined += ids.tolist()
        return np.array(joined, self.dtype)

    def _decode(self, ids: list[int]) -> str:
        return str(self._processor.decode(ids))
