"""Optional steps that change or drop documents.

They are repair or refusal of invalid Unicode, limits of length, and exact de-duplication.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

UNICODE_POLICIES = ("refuse", "repair")
_DOCUMENTS_A_PASS = 1 << 24  # 400 MB of hashes and sort order at a time


@dataclass(frozen=True)
class Limits:
    """Documents outside are dropped and counted; each bound holds for every key.

    Characters are Unicode code points; tokens are counted without the end-of-document token.
    """

    min_characters: int | None = None
    max_characters: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None

    def refuses_text(self, texts: Sequence[str]) -> bool:
        """Whether a document with these texts is dropped."""
        return any(_outside(len(text), self.min_characters, self.max_characters) for text in texts)

    def refuses_tokens(self, counts: Sequence[int]) -> bool:
        """Whether a document with so many tokens, a count a key, is dropped."""
        return any(_outside(count, self.min_tokens, self.max_tokens) for count in counts)


def _outside(number: int, low: int | None, high: int | None) -> bool:
    return (low is not None and number < low) or (high is not None and number > high)


def decode_bytes(raw: bytes, policy: str) -> str:
    """UTF-8 to text.

    refuse: ValueError with the byte and its offset; repair: each invalid sequence becomes U+FFFD.
    """
    if policy == "repair":
        return raw.decode("utf-8", "replace")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"invalid UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start} ({error.reason})"
        ) from error


def clean_text(text: str, policy: str) -> str:
    """Text without lone surrogates, which JSON's escapes can make.

    refuse: ValueError; repair: pairs are joined, lone ones become U+FFFD.
    """
    # Most texts are ASCII, which Python knows without looking at them.
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError as error:
        # In UTF-16 a pair of surrogates is one character, so decoding joins it.
        if policy == "repair":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise ValueError(
            f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        ) from error


def content_hash(texts: Sequence[str]) -> bytes:
    """16 bytes that stand for a document: xxh3 (128 bits) of its texts and their lengths.

    The hash is not meant to withstand an adversary.
    """
    digest = xxhash.xxh3_128()
    for text in texts:
        raw = text.encode()
        # With the length, ("ab", "c") and ("a", "bc") differ.
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.digest()


def first_occurrences(
    hashes: npt.NDArray[Any], documents_a_pass: int = _DOCUMENTS_A_PASS
) -> npt.NDArray[np.bool_]:
    """Which documents are the first with their hash.

    hashes: uint64 [documents, 2], perhaps memory-mapped. Memory: one byte a document, plus the
    hashes of one pass. Each pass looks at the documents whose hash falls into its share, so that
    equal hashes meet in one pass.
    """
    keep = np.ones(len(hashes), dtype=bool)
    passes = -(-len(hashes) // documents_a_pass)
    for number in range(passes):
        indices = _indices_in_share(hashes, number, passes, documents_a_pass)
        rows = np.asarray(hashes[indices])
        order = np.lexsort((rows[:, 1], rows[:, 0]))  # stable: equal hashes stay in document order
        ordered = rows[order]
        # Sorted by hash, every occurrence but the first stands behind an equal one.
        equals_previous = (ordered[1:] == ordered[:-1]).all(axis=1)
        repeated = np.flatnonzero(equals_previous) + 1
        keep[indices[order[repeated]]] = False
    return keep


def _indices_in_share(
    hashes: npt.NDArray[Any], number: int, passes: int, step: int
) -> npt.NDArray[np.int64]:
    """Documents whose hash falls into share `number`; `step` hashes are looked at together."""
    indices = []
    for start in range(0, len(hashes), step):
        in_share = hashes[start : start + step, 0] % passes == number
        indices.append(start + np.flatnonzero(in_share))
    return np.concatenate(indices)
