"""Changed files of a checkpoint whose hashes are right, and files of many small blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import xxhash

from megatron_completep.checkpoint import files
from megatron_completep.checkpoint.manifest import MANIFEST

SMALL_BLOCKS = 4096  # bytes, so that the files of a tiny model have many blocks


def use_small_blocks(patch: pytest.MonkeyPatch) -> None:
    """Hash and read files in blocks of `SMALL_BLOCKS`."""
    patch.setattr("megatron_completep.checkpoint.files.BLOCK_SIZE", SMALL_BLOCKS)
    patch.setattr("megatron_completep.checkpoint.save.BLOCK_SIZE", SMALL_BLOCKS)
    patch.setattr(files.BlockHasher.__init__, "__defaults__", (SMALL_BLOCKS,))


def write_manifest(folder: Path, text: bytes) -> None:
    """Write a manifest, a JSON object, with a right hash at its end."""
    body = text.rstrip()
    assert body.endswith(b"\n}")
    ending = f',\n "xxh3": "{xxhash.xxh3_128_hexdigest(body)}"\n}}\n'
    (folder / MANIFEST).write_bytes(body[:-2] + ending.encode())


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest without its hash."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    manifest.pop("xxh3")
    return manifest


def change_manifest(folder: Path, change: dict[str, Any]) -> None:
    """Replace entries of the manifest."""
    write_manifest(folder, json.dumps({**manifest_of(folder), **change}, indent=1).encode())
