"""The manifest: one JSON file that makes a folder a checkpoint. A folder without a valid one does not exist.

It ends with the hash of all that stands before, so that any changed byte is seen; the tensor files are hashed block by block.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import Field, StringConstraints, ValidationError

from megatron_completep.config.schema import NonNegativeInt, PositiveInt, Section
from megatron_completep.errors import CheckpointError

MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step_(\d{8,})")
MAX_BYTES = 1 << 29
_SEAL = re.compile(rb',\n "xxh3": "([0-9a-f]{32})"\n}\n\Z')

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]+\.safetensors$")]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
ParameterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]{1,200}$")]
Shape = Annotated[list[NonNegativeInt], Field(max_length=8)]


class StoredParameter(Section):
    """What a checkpoint knows of a parameter besides its values."""

    role: str
    width_ratio: float
    shape: Shape
    dtype: Literal["F32", "F64"]


class StoredFile(Section):
    """A tensor file: its size in bytes and the xxh3 hash of every block of it."""

    name: FileName
    size: NonNegativeInt
    blocks: list[Hash]


class StoredOrder(Section):
    """The order of the data: for how many samples it was planned, and a digest of those that were consumed (data_order.py)."""

    planned_samples: PositiveInt
    digest: Hash


class Manifest(Section):
    """All of a checkpoint except the tensors' values."""

    format: Literal["megatron-completep"] = "megatron-completep"
    version: Literal[1] = 1
    step: NonNegativeInt
    attempt: str
    state: dict[str, Any]  # the training loop's RunState
    updates: float  # optimizer steps really made
    config: dict[str, Any]
    table: dict[str, Any]
    fingerprints: dict[str, Any]  # of data and tokenizer, as their owners describe them
    order: StoredOrder | None = None  # of the data that were consumed; earlier versions did not keep it
    layout: dict[str, int]  # ranks along each axis when it was written, for the reader's information
    rng: dict[str, Any]
    versions: dict[str, str]
    parameters: dict[ParameterName, StoredParameter]
    block_size: Annotated[int, Field(ge=4096, le=1 << 26, multiple_of=64)]
    files: list[StoredFile]
    elements: PositiveInt  # of one state, for the check that nothing is missing

    @property
    def total_size(self) -> int:
        """Bytes of all tensor files."""
        return sum(file.size for file in self.files)


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def committed_steps(checkpoints: Path) -> dict[int, Path]:
    """The folders named like a checkpoint that hold a manifest, by step, lowest first. Names decide, never times."""
    found = {}
    for entry in os.scandir(checkpoints) if checkpoints.is_dir() else ():
        match = STEP_FOLDER.fullmatch(entry.name)
        if match and entry.is_dir(follow_symlinks=False) and (checkpoints / entry.name / MANIFEST).is_file():
            found[int(match[1])] = Path(entry.path)
    return dict(sorted(found.items()))


def seal(manifest: Manifest) -> bytes:
    """The manifest as it is written: JSON that ends with its own hash."""
    body = json.dumps(manifest.model_dump(mode="json"), indent=1, allow_nan=False).encode()
    assert body.endswith(b"\n}")
    digest = xxhash.xxh3_128_hexdigest(body)
    return body[:-2] + f',\n "xxh3": "{digest}"\n}}\n'.encode()


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint. Raises CheckpointError that names the file and what is wrong with it."""
    path = folder / MANIFEST
    data = read_regular_file(path, MAX_BYTES)
    match = _SEAL.search(data)
    if match is None:
        raise CheckpointError(f"{path}: does not end with its own hash, so it is cut off or not a manifest. {_REMEDY}")
    found = xxhash.xxh3_128_hexdigest(data[: match.start()] + b"\n}")
    if found != match[1].decode():
        raise CheckpointError(f"{path}: changed since it was written: its hash is {found}, expected {match[1].decode()}. {_REMEDY}")
    try:
        value = json.loads(data)
        value.pop("xxh3")
        manifest = Manifest.model_validate(value)
    except (ValueError, ValidationError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a manifest that this version reads: {error}") from None
    expected = STEP_FOLDER.fullmatch(folder.name)
    if expected and int(expected[1]) != manifest.step:
        raise CheckpointError(f"{path}: holds step {manifest.step}, but the folder is {folder.name}. Rename it back.")
    return manifest


def read_regular_file(path: Path, limit: int) -> bytes:
    """A whole file of bounded size; symbolic links and anything but plain files are refused."""
    with open_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"{path}: {size} bytes, more than the {limit} that such a file may have.")
        return file.read()


def open_regular_file(path: Path) -> Any:
    """Open a plain file for reading, unbuffered; a symbolic link, device or pipe is refused. Raises CheckpointError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        reason = "is a symbolic link, which is not followed" if path.is_symlink() else (error.strerror or str(error))
        raise CheckpointError(f"{path}: {reason}. {_REMEDY}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: not a plain file. {_REMEDY}")
    return os.fdopen(descriptor, "rb", buffering=0)


_REMEDY = "Restore the file, or move the checkpoint's folder away to continue from an older one."
