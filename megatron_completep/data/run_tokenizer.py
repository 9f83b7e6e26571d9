"""A run's own copy of its tokenizer, RUN/tokenizer: so that its texts can be read when the original is gone, or the run has moved.

record.json there says the family, the model's file and the tokenizer's hash, and the hash of every file; it is written last.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import xxhash

from megatron_completep.config.schema import DataConfig, TokenizerConfig
from megatron_completep.data.files import printable, read_json
from megatron_completep.data.indexed import hash_file
from megatron_completep.data.tokenizer import (
    TiktokenTokenizer,
    Tokenizer,
    build_tokenizer,
    model_path,
)
from megatron_completep.errors import DataError

FOLDER, RECORD = "tokenizer", "record.json"
_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)  # beside a tokenizer.json


def keep_tokenizer(settings: TokenizerConfig | None, run: Path) -> str | None:
    """Copy the tokenizer's files into the run's folder unless they are there. A sentence for the user where it cannot be, else None.

    A run without a copy trains all the same, so nothing is raised. Files that are there and are not such a copy stay as they are.
    """
    if settings is None or settings.type == "bytes":
        return None
    folder = run / FOLDER
    try:
        tokenizer = build_tokenizer(settings)
        model, files = _files_of(tokenizer, settings)
        kept = _read_record(folder)
        if kept is None or kept["hash"] != tokenizer.hash:
            _write(
                folder, files, {**tokenizer.identity(), "model": model}, replace=kept is not None
            )
        _check(folder)
    except (DataError, OSError) as error:
        return f"warning: no copy of the tokenizer is kept in {printable(folder)}: {error}"
    return None


def at_hand(settings: TokenizerConfig, run: Path) -> TokenizerConfig:
    """The run's own copy where it has one, else the tokenizer as it was configured. Raises DataError for a damaged copy."""
    return copy_in(run / FOLDER) or settings


def copy_in(folder: Path) -> TokenizerConfig | None:
    """The copy that a run keeps in this folder; None where it holds none. Raises DataError for a damaged one."""
    record = _read_record(folder)
    if record is None:
        return None
    _check(folder)
    encoding, _, name = record["model"].rpartition(":")
    return TokenizerConfig(
        type=record["type"], model=f"{encoding}:{folder / name}" if encoding else str(folder / name)
    )


def with_readable_tokenizer(data: DataConfig, run: Path) -> DataConfig:
    """The same settings; where the tokenizer's model is gone, with the run's copy of it."""
    if (
        data.tokenizer is None
        or data.tokenizer.model is None
        or os.path.exists(model_path(data.tokenizer))
    ):
        return data
    return data.model_copy(update={"tokenizer": at_hand(data.tokenizer, run)})


def _files_of(tokenizer: Tokenizer, settings: TokenizerConfig) -> tuple[str, dict[str, bytes]]:
    """(how `data.tokenizer.model` would name the copy within its folder, name -> content)."""
    if isinstance(tokenizer, TiktokenTokenizer):
        name = f"{tokenizer.model_name}.tiktoken"
        return f"{tokenizer.model_name}:{name}", {name: tokenizer.ranks_file()}
    path = Path(model_path(settings))
    if tokenizer.type != "huggingface":
        return path.name, {path.name: path.read_bytes()}
    path = path / "tokenizer.json" if path.is_dir() else path
    companions = [path.parent / name for name in _COMPANIONS]
    beside = {
        companion.name: companion.read_bytes() for companion in companions if companion.is_file()
    }
    return "tokenizer.json", {"tokenizer.json": path.read_bytes(), **beside}


def _read_record(folder: Path) -> dict[str, Any] | None:
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        record = read_json(path)
        digest = record.pop("xxh3_64")
        if digest != _hash(record):
            raise ValueError("its hash is not the one that it ends with")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(
            f"{printable(path)}: is not what was written ({error}). {_REMEDY}"
        ) from None
    return dict(record)


def _check(folder: Path) -> None:
    """Raises DataError where a file is not what was written."""
    record = _read_record(folder)
    assert record is not None
    for name, expected in record["files"].items():
        try:
            found = hash_file(folder / name)
        except OSError as error:
            raise DataError(f"{printable(folder / name)}: {error.strerror}. {_REMEDY}") from None
        if found != expected:
            raise DataError(
                f"{printable(folder / name)}: content: xxh3_64 {found}, but {expected} was written. {_REMEDY}"
            )


def _write(folder: Path, files: dict[str, bytes], identity: dict[str, Any], replace: bool) -> None:
    """Files first, the record last. Without `replace`, a file that is there must have the same content."""
    folder.mkdir(exist_ok=True)
    foreign = [
        name
        for name, content in files.items()
        if (folder / name).exists() and (folder / name).read_bytes() != content
    ]
    if foreign and not replace:
        raise DataError(f"{foreign[0]} there is another file. Move it away.")
    record = {
        **identity,
        "files": {name: xxhash.xxh3_64_hexdigest(content) for name, content in files.items()},
    }
    content = json.dumps({**record, "xxh3_64": _hash(record)}, indent=1).encode()
    (folder / RECORD).unlink(missing_ok=True)
    for name, raw in {**files, RECORD: content}.items():
        if not (folder / name).exists() or (folder / name).read_bytes() != raw:
            partial = folder / f"{name}.partial"
            partial.write_bytes(raw)
            partial.replace(folder / name)


def _hash(record: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(record, sort_keys=True).encode())


_REMEDY = "Restore it, or remove the folder to use data.tokenizer again."
