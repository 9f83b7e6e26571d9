"""Which text the runs of a sweep or a ladder were trained on, so that none of another one joins.

A configuration names files. What is in them may be another text the next day, and losses on two
texts cannot be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_completep.config.schema import Config
from megatron_completep.data.corpus import identity_of_files
from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.errors import DataError

Text = list[dict[str, Any]]  # what tells each source from others, ready for JSON


def text_of(config: Config) -> Text | None:
    """What a run reads, training and validation; None where a file of it is not here."""
    sources = [*config.data.train, *(config.data.validation or [])]
    try:
        return [identity_of_files(IndexedDataset(source.prefix)) for source in sources]
    except DataError:
        return None


def check_text(results: Iterable[tuple[Path, Config, Text | None]]) -> None:
    """Raises DataError where a result is of another text than its files hold now.

    results: path, configuration and text of each; None: of a version that kept no text.
    """
    present: dict[tuple[str, ...], Text | None] = {}
    for path, config, recorded in results:
        prefixes = _prefixes(config)
        if prefixes not in present:
            present[prefixes] = text_of(config)
        now = present[prefixes]
        if recorded is None or now is None or recorded == now:
            continue
        raise DataError(
            f"{path}: what is finished read another text than {', '.join(prefixes)} hold now "
            f"({_size(recorded)} then, {_size(now)} now). Runs on two texts cannot be compared: "
            "use another folder, or empty this one."
        )


def _prefixes(config: Config) -> tuple[str, ...]:
    return tuple(source.prefix for source in [*config.data.train, *(config.data.validation or [])])


def _size(text: Sequence[dict[str, Any]]) -> str:
    documents = sum(source["documents"] for source in text)
    tokens = sum(source["tokens"] for source in text)
    return f"{tokens:,} tokens in {documents:,} documents"
