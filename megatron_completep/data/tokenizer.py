"""Text to token ids and back: four families of tokenizers behind one interface.

Each library is imported only when its type is asked for. Text never turns into special tokens: a
document that contains the characters `<|endoftext|>` is encoded as those characters. Special tokens
(end of document included) decode to nothing.
"""

from __future__ import annotations

import base64
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_completep.data.files import printable, read_json, require_regular
from megatron_completep.data.indexed import dtype_for_vocabulary
from megatron_completep.errors import DataError

# Ids; a larger vocabulary is a damaged file, and would ask for its size in memory.
MAX_VOCABULARY = 1 << 24
SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character and decodes both to a space
# By which models know the token, in the order in which they are looked for.
_END_OF_DOCUMENT_NAMES = (
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


class Tokenizer:
    """Base of all families. Subclasses implement `_encode_batch` and `_decode`.

    type: the family's name. vocab_size: ids are in [0, vocab_size). eod_id: end-of-document id or
    None. hash: xxh3 (64 bits, hex) of the model's bytes.
    """

    vocab_size: int
    eod_id: int | None
    hash: str
    model_name: str | None = None
    type: str = ""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the ids that `encode_batch` returns, the one that token files store."""
        return dtype_for_vocabulary(self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without an end-of-document token."""
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

    def identity(self) -> dict[str, str | int | None]:
        """What is recorded beside token files; tokenizers with equal identities give equal ids."""
        return {
            "type": self.type,
            "model": self.model_name,
            "hash": self.hash,
            "vocab_size": self.vocab_size,
            "eod_id": self.eod_id,
        }

    def _encode_batch(self, texts: Sequence[str]) -> list[IdArray]:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError


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


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file.

    SentencePiece's own code turns the character U+2581 into a space. For a model that is lossless
    otherwise (identity normalization, byte fallback: what tools/train_tokenizer.py makes) that
    character is encoded as its three bytes instead.
    """

    type = "sentencepiece"

    def __init__(self, model: str):
        import sentencepiece

        content = _read(model, "sentencepiece")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(f"{model}: not a SentencePiece model ({error}).") from error
        self.model_name = printable(Path(model).name)
        self.hash = xxhash.xxh3_64_hexdigest(content)
        self.vocab_size = self._processor.get_piece_size()
        self.eod_id = self._find_end_of_document()
        self._space_mark_ids = self._find_space_mark()

    def _find_end_of_document(self) -> int | None:
        if self._processor.eos_id() >= 0:
            return int(self._processor.eos_id())
        # A name that the model does not know has the id of the unknown token.
        for name in _END_OF_DOCUMENT_NAMES:
            index = self._processor.piece_to_id(name)
            if index != self._processor.unk_id():
                return int(index)
        return None

    def _find_space_mark(self) -> list[int] | None:
        """The ids of U+2581's three bytes; None where the model is not lossless otherwise."""
        byte_names = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
        ids = [self._processor.piece_to_id(name) for name in byte_names]
        probe = "  a \n\tb "
        keeps_spaces = self._processor.decode(self._processor.encode(probe)) == probe
        has_bytes = all(self._processor.is_byte(i) for i in ids)
        return ids if keeps_spaces and has_bytes else None

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


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` file, or a folder with one.

    A `tokenizer_config.json` beside it may name the end-of-document token.
    """

    type = "huggingface"

    def __init__(self, model: str):
        import tokenizers

        path = Path(model) / "tokenizer.json" if Path(model).is_dir() else Path(model)
        content = _read(str(path), "huggingface")
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
        configured_names = _configured_end_of_document(path.parent / "tokenizer_config.json")
        names = [*configured_names, *_END_OF_DOCUMENT_NAMES]
        self.eod_id = next((vocabulary[name] for name in names if name in vocabulary), None)

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


# What OpenAI published with each encoding: splitting pattern, number of ranks (they are in the
# `.tiktoken` file), end-of-document id.
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TIKTOKEN_ENCODINGS = {
    "gpt2": (_GPT2_PATTERN, 50256, 50256),
    "r50k_base": (_GPT2_PATTERN, 50256, 50256),
    "p50k_base": (_GPT2_PATTERN, 50280, 50256),
    "cl100k_base": (_CL100K_PATTERN, 100256, 100257),
    "o200k_base": (_O200K_PATTERN, 199998, 199999),
}


class TiktokenTokenizer(Tokenizer):
    """An encoding's name, or `[ENCODING:]FILE.tiktoken`.

    tiktoken downloads a named encoding (`cl100k_base`) or finds it in its cache. A file holds the
    ranks only. The splitting pattern is that of ENCODING, which may be left out when the file is
    named after it; the end-of-document id is the published one when the file holds the published
    number of ranks, else the first id after the ranks.
    """

    type = "tiktoken"

    def __init__(self, model: str):
        import tiktoken

        encoding_name, _, path = model.rpartition(":")
        if Path(path).suffix == ".tiktoken" or encoding_name:
            self._encoding = self._from_file(encoding_name or Path(path).stem, path)
        else:
            try:
                self._encoding = tiktoken.get_encoding(model)
            # A ValueError for an unknown name, whatever the network raises for a download.
            except Exception as error:
                names = ", ".join(tiktoken.list_encoding_names())
                raise DataError(
                    f"tiktoken encoding {model} cannot be had ({str(error).splitlines()[0]}). "
                    f"Give the path of its .tiktoken file, or one of {names}."
                ) from error
        self.model_name = self._encoding.name
        self.vocab_size = self._encoding.n_vocab
        self.eod_id = self._encoding.eot_token
        # The pattern decides as much as the ranks how a text is cut.
        pattern = self._encoding._pat_str.encode()
        self.hash = xxhash.xxh3_64_hexdigest(self.ranks_file() + pattern)

    def ranks_file(self) -> bytes:
        """The content of a .tiktoken file with this encoding's ranks."""
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in self._ranks())

    def _ranks(self) -> list[tuple[bytes, int]]:
        return sorted(self._encoding._mergeable_ranks.items(), key=lambda item: item[1])

    def _from_file(self, name: str, path: str) -> Any:
        """The encoding `name` with the ranks of a file. Raises DataError."""
        import tiktoken

        if name not in _TIKTOKEN_ENCODINGS:
            raise DataError(
                f"{path}: a .tiktoken file does not hold its splitting pattern, and {name} is none "
                f"of {', '.join(sorted(_TIKTOKEN_ENCODINGS))}. "
                f"Write ENCODING:{path} to say which pattern applies."
            )
        pattern, published_ranks, eod_id = _TIKTOKEN_ENCODINGS[name]
        ranks = _read_ranks(path)
        # A file of another vocabulary: the published id may be that of a token.
        if len(ranks) != published_ranks or eod_id in ranks.values():
            eod_id = max(ranks.values()) + 1
        return tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": eod_id}
        )

    def _encode_batch(self, texts: Sequence[str]) -> list[IdArray]:
        arrays = []
        for document in texts:
            ids = self._encoding.encode_to_numpy(document, disallowed_special=())
            arrays.append(ids.astype(self.dtype))
        return arrays

    def _decode(self, ids: list[int]) -> str:
        special = set(self._encoding._special_tokens.values())
        return str(self._encoding.decode([i for i in ids if i not in special]))


def _read_ranks(path: str) -> dict[bytes, int]:
    """Token -> rank of a .tiktoken file. Raises DataError for ranks that make no tokenizer."""
    ranks: dict[bytes, int] = {}
    lines_by_rank: defaultdict[int, list[int]] = defaultdict(list)
    for number, line in enumerate(_read(path, "tiktoken").splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: expected a base64 token and its rank, found {line[:40]!r}."
            ) from error
        lines_by_rank[int(rank)].append(number)

    # Ranks must be a numbering of tokens from which every text can be composed.
    single_bytes = {bytes([byte]) for byte in range(256)}
    if single_bytes - ranks.keys():
        raise DataError(
            f"{path}: the ranks leave out some of the 256 single bytes, "
            "so some text could not be encoded."
        )
    for _, lines in sorted(lines_by_rank.items()):
        if len(lines) > 1:
            raise DataError(
                f"{path}: lines {lines[0]} and {lines[1]} have the same rank; "
                "a rank is a token's id. Restore the file."
            )
    if len(ranks) != len(lines_by_rank):
        raise DataError(
            f"{path}: {len(lines_by_rank)} ranks for {len(ranks)} tokens: "
            "a token stands there twice. Restore the file."
        )
    lowest = min(lines_by_rank)
    highest = max(lines_by_rank)
    if lowest < 0 or highest >= MAX_VOCABULARY:
        raise DataError(
            f"{path}: ranks go from {lowest} to {highest}; "
            f"they are ids from 0 to {MAX_VOCABULARY - 1}."
        )
    return ranks


_FAMILIES = {
    "sentencepiece": SentencePieceTokenizer,
    "huggingface": HuggingFaceTokenizer,
    "tiktoken": TiktokenTokenizer,
}


def build_tokenizer(config: TokenizerSettings) -> Tokenizer:
    """The tokenizer that `config.type` and `config.model` name.

    Raises DataError for an unknown type or an unusable model.
    """
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
    if model in _TIKTOKEN_ENCODINGS or path.suffix == ".tiktoken":
        return "tiktoken"
    if path.is_dir() or path.suffix == ".json":
        return "huggingface"
    if path.suffix == ".model":
        return "sentencepiece"
    begins_as_json = _read(model, "named")[:1].lstrip() == b"{"
    return "huggingface" if begins_as_json else "sentencepiece"


def _read(path: str, family: str) -> bytes:
    try:
        require_regular(path)
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            f"{printable(path)}: the {family} tokenizer's model cannot be read "
            f"({error.strerror}). Give its file."
        ) from error


def _configured_end_of_document(path: Path) -> tuple[str, ...]:
    """The end-of-document token that a tokenizer_config.json names, or none. Raises DataError."""
    if not path.exists():
        return ()
    try:
        token = read_json(path).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a JSON object ({error}).") from error
    # Either the token's text, or an object that describes it.
    if isinstance(token, dict):
        token = token.get("content")
    return (token,) if isinstance(token, str) else ()
