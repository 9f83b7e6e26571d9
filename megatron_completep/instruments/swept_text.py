"""Which text the runs of a sweep or a ladder were trained on, so that none of another one joins.

A configuration names files. What is in them may be another text the next day, and losses on two
texts cannot be compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_completep.config.schema import Config
from megatron_completep.data.corpus import identity_of_files
from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.errors import DataError

Text = list[dict[str, Any]]  # what tells each source from others, ready for JSON


def text_of(config: Config) -> Text | None:
    """What a run reads, training and validation; None where a file of it is not here."""
    text: Text = []
    for source in [*config.data.train, *(config.data.validation or [])]:
        identity = _identity_now(source.prefix)
        if identity is None:
            return None
        text.append(identity)
    return text


def check_text(results: Iterable[tuple[Path, Text | None]]) -> None:
    """Raises DataError where a result is of another text than its files hold now.

    results: path and text of each; None: of a version that kept no text.
    """
    present: dict[str, dict[str, Any] | None] = {}
    for path, recorded in results:
        for source in recorded or []:
            prefix = source["prefix"]
            if prefix not in present:
                present[prefix] = _identity_now(prefix)
            now = present[prefix]
            if now is None or now == source:
                continue
            raise DataError(
                f"{path}: what is finished read another text than {prefix} holds now "
                f"({_size(source)} then, {_size(now)} now). Runs on two texts cannot be compared: "
                "use another folder, or empty this one."
            )


def _identity_now(prefix: str) -> dict[str, Any] | None:
    """Of the files as they are now; None where they are not here."""
    try:
        return identity_of_files(IndexedDataset(prefix))
    except DataError:
        return None


def _size(source: dict[str, Any]) -> str:
    return f"{source['tokens']:,} tokens in {source['documents']:,} documents"
