"""Whether the documents of a corpus begin with a token of their own, and whether all agree.

PREFIX.json records the ids that each document begins with (`beginning`; an empty list: none).
Corpora that Megatron made, or that were made before there was such a record, say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_completep.config.schema import DataConfig
from megatron_completep.data.indexed import read_sidecar
from megatron_completep.data.tokenizer import Tokenizer, build_tokenizer
from megatron_completep.errors import DataError

FIELD = "beginning"  # of PREFIX.json
Beginning = tuple[int, ...]


def recorded_beginning(sidecar: Mapping[str, Any] | None) -> Beginning | None:
    """What each document begins with, by a corpus's PREFIX.json; None where it does not say."""
    ids = (sidecar or {}).get(FIELD)
    return tuple(ids) if isinstance(ids, list) else None


def common_beginning(corpora: Sequence[tuple[str, Mapping[str, Any] | None]]) -> Beginning | None:
    """What the documents of all corpora begin with; None where one of them does not say.

    corpora: (prefix, content of PREFIX.json or None). Raises DataError where two differ.
    """
    recorded = _recorded(corpora)
    for prefix, ids in recorded[1:]:
        first_prefix, first_ids = recorded[0]
        if ids != first_ids:
            raise DataError(
                f"{prefix}.json: {FIELD}: its documents begin {shown(ids)}, those of "
                f"{first_prefix} {shown(first_ids)}. A model reads either the one or the other: "
                "preprocess them alike (--prepend-bos, --no-prepend-bos)."
            )
    if not recorded or len(recorded) < len(corpora):
        return None
    return recorded[0][1]


def check_beginnings(data: DataConfig, tokenizer: Tokenizer | None) -> None:
    """Compare all sources, validation included, among each other and with the tokenizer.

    Raises DataError. Sources that do not say pass; `beginning_lines` names them.
    """
    corpora = _corpora(data)
    common_beginning(corpora)
    recorded = _recorded(corpora)
    if tokenizer is None or not recorded:
        return
    prefix, ids = recorded[0]
    if ids != tokenizer.beginning:
        raise DataError(
            f"{prefix}.json: {FIELD}: its documents begin {shown(ids)}, texts of data.tokenizer "
            f"{shown(tokenizer.beginning)}. Set data.tokenizer.prepend_bos to "
            f"{str(bool(ids)).lower()}, or preprocess the corpus again."
        )


def beginning_lines(data: DataConfig) -> list[str]:
    """Sentences on sources that do not say what their documents begin with, where it matters."""
    corpora = _corpora(data)
    silent = [prefix for prefix, sidecar in corpora if recorded_beginning(sidecar) is None]
    if not silent:
        return []
    expected: Beginning = ()
    if data.tokenizer is not None:
        try:
            expected = build_tokenizer(data.tokenizer).beginning
        except DataError:
            return []  # training works without it; that it cannot be kept is said elsewhere
    elif recorded := _recorded(corpora):
        expected = recorded[0][1]
    # Without a beginning anywhere there is nothing that they could lack.
    if not expected:
        return []
    return [
        f"{', '.join(silent)}: not recorded whether the documents begin {shown(expected)}, as "
        "this run's texts do. Where they do not, set data.tokenizer.prepend_bos to false."
    ]


def trained_beginning(fingerprints: Mapping[str, Any]) -> Beginning | None:
    """What the documents of a checkpoint's corpora began with; None where it is not known."""
    sources = fingerprints.get("data") or []
    recorded = [recorded_beginning(source) for source in sources]
    known = [ids for ids in recorded if ids is not None]
    return known[0] if known else None


def shown(ids: Sequence[int]) -> str:
    """What a document begins with, in a sentence."""
    if not ids:
        return "without a beginning-of-text token"
    return f"with the token {', '.join(map(str, ids))}"


def _corpora(data: DataConfig) -> list[tuple[str, Mapping[str, Any] | None]]:
    """(prefix, content of PREFIX.json) of every source that is configured."""
    prefixes = [source.prefix for source in (*data.train, *(data.validation or []))]
    return [(prefix, read_sidecar(prefix)) for prefix in dict.fromkeys(prefixes)]


def _recorded(
    corpora: Sequence[tuple[str, Mapping[str, Any] | None]],
) -> list[tuple[str, Beginning]]:
    """The corpora that say what their documents begin with."""
    recorded = []
    for prefix, sidecar in corpora:
        ids = recorded_beginning(sidecar)
        if ids is not None:
            recorded.append((prefix, ids))
    return recorded
