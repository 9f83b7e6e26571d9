"""tiktoken's encodings."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from megatron_completep.data.tokenizer_base import (
    MAX_VOCABULARY,
    IdArray,
    Tokenizer,
    read_model,
)
from megatron_completep.errors import DataError

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
TIKTOKEN_ENCODINGS = {
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
        # The pattern decides as much as the ranks how a text is cut. Versions of the library spell
        # one encoding's pattern differently, so it counts as it was published.
        written = self._encoding._pat_str
        published = TIKTOKEN_ENCODINGS.get(self._encoding.name, (written,))[0]
        ranks = self.ranks_file()
        self.hash = xxhash.xxh3_64_hexdigest(ranks + published.encode())
        self.former_hashes = frozenset({xxhash.xxh3_64_hexdigest(ranks + written.encode())})

    def _id_of(self, name: str) -> int | None:
        index: int | None = self._encoding._special_tokens.get(name)
        return index

    def ranks_file(self) -> bytes:
        """The content of a .tiktoken file with this encoding's ranks."""
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in self._ranks())

    def _ranks(self) -> list[tuple[bytes, int]]:
        return sorted(self._encoding._mergeable_ranks.items(), key=lambda item: item[1])

    def _from_file(self, name: str, path: str) -> Any:
        """The encoding `name` with the ranks of a file. Raises DataError."""
        import tiktoken

        if name not in TIKTOKEN_ENCODINGS:
            raise DataError(
                f"{path}: a .tiktoken file does not hold its splitting pattern, and {name} is none "
                f"of {', '.join(sorted(TIKTOKEN_ENCODINGS))}. "
                f"Write ENCODING:{path} to say which pattern applies."
            )
        pattern, published_ranks, eod_id = TIKTOKEN_ENCODINGS[name]
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
    for number, line in enumerate(read_model(path, "tiktoken").splitlines(), start=1):
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
