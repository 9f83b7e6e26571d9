"""A run's own copy of its tokenizer, RUN/tokenizer.

With it the run's texts can be read when the original is gone, or the run has moved. record.json
there holds the family, the model's file, the tokenizer's hash, and the hash of every file; it is
written last.
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

FOLDER = "tokenizer"
RECORD = "record.json"
# Files that may lie beside a tokenizer.json and belong to it.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

_REMEDY = "Restore it, or remove the folder to use data.tokenizer again."


def keep_tokenizer(settings: TokenizerConfig | None, run: Path) -> str | None:
    """Copy the tokenizer's files into the run's folder unless they are there.

    Returns a sentence for the user where it cannot be done, else None. Nothing is raised, since a
    run without a copy trains all the same. Files that are there and are not such a copy stay as
    they are.
    """
    if settings is None or settings.type == "bytes":
        return None
    folder = run / FOLDER
    try:
        tokenizer = build_tokenizer(settings)
        model, files = _files_of(tokenizer, settings)
        record = _read_record(folder)
        # The companions that decide about a beginning need not be among the copied files.
        identity = {
            **tokenizer.identity(),
            "model": model,
            "prepend_bos": bool(tokenizer.beginning),
            "eod_token": settings.eod_token,
        }
        names = ("hash", "prepend_bos", "eod_token")
        if record is None or any(record.get(name) != identity[name] for name in names):
            _write(folder, files, identity, replace=record is not None)
        _check(folder)
    except (DataError, OSError) as error:
        return f"warning: no copy of the tokenizer is kept in {printable(folder)}: {error}"
    return None


def available_tokenizer(settings: TokenizerConfig, run: Path) -> TokenizerConfig:
    """The run's own copy where it has one, else the tokenizer as it was configured.

    What the configuration says of beginnings and ends holds for the copy, too. Raises DataError for
    a damaged copy.
    """
    copy = copy_in(run / FOLDER)
    if copy is None:
        return settings
    chosen = settings.model_dump(include={"prepend_bos", "eod_token"}, exclude_none=True)
    return copy.model_copy(update=chosen)


def copy_in(folder: Path) -> TokenizerConfig | None:
    """The copy that a run keeps in this folder; None where there is none.

    Raises DataError for a damaged one.
    """
    record = _read_record(folder)
    if record is None:
        return None
    # A damaged model may load all the same, and decode to another text.
    _check(folder)
    # The record names the file within the folder, after tiktoken's encoding where there is one.
    encoding, _, name = record["model"].rpartition(":")
    path = str(folder / name)
    model = f"{encoding}:{path}" if encoding else path
    # Records of before these two settings lack them.
    return TokenizerConfig(
        type=record["type"],
        model=model,
        prepend_bos=record.get("prepend_bos"),
        eod_token=record.get("eod_token"),
    )


def with_readable_tokenizer(data: DataConfig, run: Path) -> DataConfig:
    """The same settings; where the tokenizer's model is gone, with the run's copy of it."""
    tokenizer = data.tokenizer
    if tokenizer is None or tokenizer.model is None:
        return data
    if os.path.exists(model_path(tokenizer)):
        return data
    return data.model_copy(update={"tokenizer": available_tokenizer(tokenizer, run)})


def _files_of(tokenizer: Tokenizer, settings: TokenizerConfig) -> tuple[str, dict[str, bytes]]:
    """(how `data.tokenizer.model` would name the copy within its folder, name -> content)."""
    # tiktoken may have downloaded the encoding: its ranks are written anew.
    if isinstance(tokenizer, TiktokenTokenizer):
        name = f"{tokenizer.model_name}.tiktoken"
        return f"{tokenizer.model_name}:{name}", {name: tokenizer.ranks_file()}
    path = Path(model_path(settings))
    if tokenizer.type != "huggingface":
        return path.name, {path.name: path.read_bytes()}
    if path.is_dir():
        path = path / "tokenizer.json"
    files = {"tokenizer.json": path.read_bytes()}
    for name in _COMPANIONS:
        companion = path.parent / name
        if companion.is_file():
            files[name] = companion.read_bytes()
    return "tokenizer.json", files


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The content of record.json without its own hash; None where there is none."""
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
    """Raise DataError where a file is not what was written."""
    record = _read_record(folder)
    assert record is not None
    # Other files in the folder are the user's.
    for name, expected in record["files"].items():
        try:
            actual = hash_file(folder / name)
        except OSError as error:
            raise DataError(f"{printable(folder / name)}: {error.strerror}. {_REMEDY}") from None
        if actual != expected:
            raise DataError(
                f"{printable(folder / name)}: content: xxh3_64 {actual}, "
                f"but {expected} was written. {_REMEDY}"
            )


def _write(folder: Path, files: dict[str, bytes], identity: dict[str, Any], replace: bool) -> None:
    """Write the files, and the record last.

    Without `replace`, a file that is there must have the same content. Raises DataError, OSError.
    """
    folder.mkdir(exist_ok=True)
    foreign_files = [name for name in files if _differs(folder / name, files[name])]
    if foreign_files and not replace:
        raise DataError(f"{foreign_files[0]} there is another file. Move it away.")

    hashes = {name: xxhash.xxh3_64_hexdigest(content) for name, content in files.items()}
    record = {**identity, "files": hashes}
    record_content = json.dumps({**record, "xxh3_64": _hash(record)}, indent=1).encode()
    # Without its record a folder counts as no copy, while its files are being replaced.
    (folder / RECORD).unlink(missing_ok=True)
    for name, content in {**files, RECORD: record_content}.items():
        path = folder / name
        if not path.exists() or _differs(path, content):
            partial = folder / f"{name}.partial"
            partial.write_bytes(content)
            partial.replace(path)


def _differs(path: Path, content: bytes) -> bool:
    """Whether a file exists and holds anything else."""
    return path.exists() and path.read_bytes() != content


def _hash(record: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(record, sort_keys=True).encode())
