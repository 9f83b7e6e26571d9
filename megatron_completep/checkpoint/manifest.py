"""The manifest: one JSON file that makes a folder a checkpoint. A folder without a valid one does not exist.

It ends with the hash of all that stands before, so that any changed byte is seen; the tensor files are hashed block by block.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import Field, StringConstraints, ValidationError, model_validator

from megatron_completep.config.schema import NonNegativeInt, PositiveInt, Section
from megatron_completep.errors import CheckpointError
from megatron_completep.optim.rule import MASTER
from megatron_completep.optim.rules import RULES

MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step_(\d{8,})")
MAX_BYTES = 1 << 29
STATES_OF_EARLIER_VERSIONS = RULES[
    "adamw"
].all_powers()  # they had this rule alone, and did not list its states
_SEAL = re.compile(rb',\n "xxh3": "([0-9a-f]{32})"\n}\n\Z')

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]+\.safetensors$")]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
StateName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,60}$")]
ParameterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]{1,200}$")]
Shape = Annotated[list[NonNegativeInt], Field(max_length=8)]


Count = Annotated[
    int, Field(ge=0, le=1 << 53)
]  # steps, samples, tokens: what a JSON reader of any language holds exactly


class Progress(Section):
    """How far the run was: the training loop's RunState."""

    step: Count
    consumed_samples: Count
    tokens: Count


class Writer(Section):
    """The run that a snapshot belongs to: its number, and the folder in which it was then."""

    number: str
    folder: str


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
    """All of a checkpoint except the tensors' values.

    states: what is stored of every parameter, in order: the masters and the states of the update rule. The number is the
        power in which a factor on a tensor goes into its state (optim/rule.py), for whoever rewrites checkpoints.
    """

    format: Literal["megatron-completep"] = "megatron-completep"
    version: Literal[1] = 1
    step: Count
    attempt: str
    state: Progress
    updates: Annotated[float, Field(ge=0)]  # optimizer steps really made
    config: dict[str, Any]
    table: dict[str, Any]
    fingerprints: dict[str, Any]  # of data and tokenizer, as their owners describe them
    order: StoredOrder | None = (
        None  # of the data that were consumed; earlier versions did not keep it
    )
    layout: dict[
        str, int
    ]  # ranks along each axis when it was written, for the reader's information
    rng: dict[str, Any]
    versions: dict[str, str]
    states: Annotated[dict[StateName, int], Field(max_length=16)] = STATES_OF_EARLIER_VERSIONS
    parameters: dict[ParameterName, StoredParameter]
    block_size: Annotated[int, Field(ge=4096, le=1 << 26, multiple_of=64)]
    files: list[StoredFile]
    elements: PositiveInt  # of one state, for the check that nothing is missing
    run: Writer | None = None  # in snapshots, which several runs keep in one place

    @model_validator(mode="after")
    def _counts_agree(self) -> Manifest:
        if self.state.step != self.step:
            raise ValueError(f"state.step = {self.state.step}, but step = {self.step}")
        if self.updates > self.step or not self.updates.is_integer():
            raise ValueError(
                f"updates = {self.updates}: a whole number of at most step = {self.step} was possible"
            )
        if MASTER not in self.states:
            raise ValueError(f"states = {list(self.states)}: without {MASTER} there are no weights")
        return self

    @property
    def total_size(self) -> int:
        """Bytes of all tensor files."""
        return sum(file.size for file in self.files)


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def committed_steps(checkpoints: Path) -> dict[int, Path]:
    """The folders named like a checkpoint that hold a manifest, by step, lowest first. Names decide, never times."""
    found = {}
    for entry, step in _named_like_checkpoints(checkpoints):
        if _why_not_counted(entry) is None:
            found[step] = Path(entry.path)
    return dict(sorted(found.items()))


def not_counted(checkpoints: Path) -> dict[int, str]:
    """What is named like a checkpoint and is none, by step: which entry, and why. For people, who would otherwise miss it."""
    found = {}
    for entry, step in _named_like_checkpoints(checkpoints):
        reason = _why_not_counted(entry)
        if reason is not None:
            found[step] = f"{entry.path} {reason}"
    return dict(sorted(found.items()))


def named_like_checkpoints(checkpoints: Path) -> list[Path]:
    """Entries named like a checkpoint, whether they are one or not."""
    return [Path(entry.path) for entry, _ in _named_like_checkpoints(checkpoints)]


def _named_like_checkpoints(checkpoints: Path) -> Iterator[tuple[os.DirEntry[str], int]]:
    if not checkpoints.is_dir():
        return
    with os.scandir(checkpoints) as entries:
        for entry in entries:
            match = STEP_FOLDER.fullmatch(entry.name)
            if match:
                yield entry, int(match[1])


def _why_not_counted(entry: os.DirEntry[str]) -> str | None:
    if entry.is_symlink():
        return "is a symbolic link, which is not followed: it does not count as a checkpoint. Put the folder itself there."
    if not entry.is_dir():
        return "is not a folder: it does not count as a checkpoint."
    if not os.path.lexists(os.path.join(entry.path, MANIFEST)):
        return (
            f"holds no {MANIFEST}: it does not count as a checkpoint. Copy it again, or remove it."
        )
    return None


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
        raise CheckpointError(
            f"{path}: does not end with its own hash, so it is cut off or not a manifest. {_REMEDY}"
        )
    found = xxhash.xxh3_128_hexdigest(data[: match.start()] + b"\n}")
    if found != match[1].decode():
        raise CheckpointError(
            f"{path}: changed since it was written: its hash is {found}, expected {match[1].decode()}. {_REMEDY}"
        )
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
        value.pop("xxh3")
        manifest = Manifest.model_validate(value)
    except ValidationError as error:
        raise CheckpointError(
            f"{path}: not a manifest that this version reads: {_in_words(error)}. {_REMEDY}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a manifest that this version reads: {error}") from None
    expected = STEP_FOLDER.fullmatch(folder.name)
    if expected and int(expected[1]) != manifest.step:
        raise CheckpointError(
            f"{path}: holds step {manifest.step}, but the folder is {folder.name}. Rename it back."
        )
    return manifest


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _in_words(error: ValidationError) -> str:
    """The first problems, each with its place and what stands there."""
    problems = error.errors(include_url=False, include_context=False)
    said = [
        f"{'.'.join(map(str, p['loc']))}: {p['msg']}, found {str(p['input'])[:60]}"
        if p["loc"]
        else p["msg"]
        for p in problems[:5]
    ]
    return "; ".join(said) + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")


def read_regular_file(path: Path, limit: int) -> bytes:
    """A whole file of bounded size; symbolic links and anything but plain files are refused."""
    with open_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(
                f"{path}: {size} bytes, more than the {limit} that such a file may have."
            )
        return file.read()


def open_regular_file(path: Path) -> Any:
    """Open a plain file for reading, unbuffered; a symbolic link, device or pipe is refused. Raises CheckpointError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        reason = (
            "is a symbolic link, which is not followed"
            if path.is_symlink()
            else (error.strerror or str(error))
        )
        raise CheckpointError(f"{path}: {reason}. {_REMEDY}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: not a plain file. {_REMEDY}")
    return os.fdopen(descriptor, "rb", buffering=0)


_REMEDY = "Restore the file, or move the checkpoint's folder away to continue from an older one."
