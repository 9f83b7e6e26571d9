"""The manifest: one JSON file that makes a folder a checkpoint.

A folder without a manifest is no checkpoint. The manifest ends with the hash of all that stands
before it, so that any changed byte is noticed, and holds the hashes of the tensor files, block by
block.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from io import FileIO
from math import prod
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
# Versions that did not list the states of their checkpoints had this rule alone.
STATES_OF_EARLIER_VERSIONS = RULES["adamw"].all_powers()
_REMEDY = "Restore the file, or move the checkpoint's folder away to continue from an older one."
_SEAL = re.compile(rb',\n "xxh3": "([0-9a-f]{32})"\n}\n\Z')

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]+\.safetensors$")]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
StateName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,60}$")]
ParameterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]{1,200}$")]
Shape = Annotated[list[NonNegativeInt], Field(max_length=8)]
# Steps, samples or tokens. JSON readers of any language hold numbers up to 2^53 exactly.
Count = Annotated[int, Field(ge=0, le=1 << 53)]


class Progress(Section):
    """How far the run was: the fields of the training loop's RunState."""

    step: Count
    consumed_samples: Count
    tokens: Count


class Writer(Section):
    """The run that a snapshot belongs to: its number, and the folder that it had then."""

    number: str
    folder: str


class StoredParameter(Section):
    """What a checkpoint knows of a parameter besides its values.

    states: those that the update rule keeps of it, and the masters; None: all of the checkpoint's.
    """

    role: str
    width_ratio: float
    shape: Shape
    dtype: Literal["F32", "F64"]
    states: Annotated[list[StateName], Field(max_length=16)] | None = None


class StoredFile(Section):
    """A tensor file: its size in bytes and the xxh3 hash of every block of it."""

    name: FileName
    size: NonNegativeInt
    blocks: list[Hash]


class StoredOrder(Section):
    """The order of the training data, see data_order.py."""

    planned_samples: PositiveInt  # for how many samples the order was planned
    digest: Hash  # of the samples that were consumed, in order


class Manifest(Section):
    """All of a checkpoint except the tensors themselves.

    states: what is stored of every parameter, in order: the masters and the states of the update
        rule. The number is the power with which a factor on a tensor multiplies its state
        (optim/rule.py), for tools that rewrite checkpoints.
    """

    format: Literal["megatron-completep"] = "megatron-completep"
    version: Literal[1] = 1
    step: Count
    attempt: str
    state: Progress
    updates: Annotated[float, Field(ge=0)]  # optimizer steps that were not skipped
    config: dict[str, Any]
    table: dict[str, Any]
    fingerprints: dict[str, Any]  # of data and tokenizer, as their owners describe them
    order: StoredOrder | None = None  # earlier versions did not store it
    layout: dict[str, int]  # ranks along each axis when it was written, for information only
    rng: dict[str, Any]
    versions: dict[str, str]
    states: Annotated[dict[StateName, int], Field(max_length=16)] = STATES_OF_EARLIER_VERSIONS
    parameters: dict[ParameterName, StoredParameter]
    block_size: Annotated[int, Field(ge=4096, le=1 << 26, multiple_of=64)]
    files: list[StoredFile]
    elements: PositiveInt  # of one state, for the check that nothing is missing
    run: Writer | None = None  # in snapshots, as several runs may store them in one place

    @model_validator(mode="after")
    def _counts_agree(self) -> Manifest:
        if self.state.step != self.step:
            raise ValueError(f"state.step = {self.state.step}, but step = {self.step}")
        if self.updates > self.step or not self.updates.is_integer():
            raise ValueError(
                f"updates = {self.updates}: a whole number of at most step = {self.step} "
                "was possible"
            )
        if MASTER not in self.states:
            raise ValueError(f"states = {list(self.states)}: without {MASTER} there are no weights")
        for name, parameter in self.parameters.items():
            states = self.states if parameter.states is None else parameter.states
            if MASTER not in states or not self.states.keys() >= set(states):
                raise ValueError(
                    f"parameters.{name}.states = {list(states)}: {MASTER} and others of "
                    f"{list(self.states)} were possible"
                )
        return self

    def states_of(self, name: str) -> list[str]:
        """The states that are stored of a parameter, in order."""
        stored = self.parameters[name].states
        return [state for state in self.states if stored is None or state in stored]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all states of all parameters."""
        total = 0
        for name, parameter in self.parameters.items():
            item_size = 8 if parameter.dtype == "F64" else 4
            total += prod(parameter.shape) * item_size * len(self.states_of(name))
        return total

    @property
    def total_size(self) -> int:
        """Bytes of all tensor files."""
        return sum(file.size for file in self.files)


def folder_name(step: int) -> str:
    """The name of the folder of a checkpoint."""
    return f"step_{step:08d}"


def committed_steps(checkpoints: Path) -> dict[int, Path]:
    """The folders named like a checkpoint that hold a manifest, by step, lowest first.

    The order is that of the names, never of modification times.
    """
    folders = {}
    for entry, step in _named_like_checkpoints(checkpoints):
        if _why_not_counted(entry) is None:
            folders[step] = Path(entry.path)
    return dict(sorted(folders.items()))


def not_counted(checkpoints: Path) -> dict[int, str]:
    """The entries named like a checkpoint that are none, by step: a text with entry and reason.

    It is for users, who may count on them.
    """
    reasons = {}
    for entry, step in _named_like_checkpoints(checkpoints):
        reason = _why_not_counted(entry)
        if reason is not None:
            reasons[step] = f"{entry.path} {reason}"
    return dict(sorted(reasons.items()))


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
        return (
            "is a symbolic link, which is not followed: it does not count as a checkpoint. "
            "Put the folder itself there."
        )
    if not entry.is_dir():
        return "is not a folder: it does not count as a checkpoint."
    if not os.path.lexists(os.path.join(entry.path, MANIFEST)):
        return (
            f"holds no {MANIFEST}: it does not count as a checkpoint. Copy it again, or remove it."
        )
    return None


def seal(manifest: Manifest) -> bytes:
    """The manifest as it is written: JSON whose last entry is the hash of the JSON without it."""
    body = json.dumps(manifest.model_dump(mode="json"), indent=1, allow_nan=False).encode()
    assert body.endswith(b"\n}")
    digest = xxhash.xxh3_128_hexdigest(body)
    return body[:-2] + f',\n "xxh3": "{digest}"\n}}\n'.encode()


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint.

    Raises CheckpointError that names the file and what is wrong with it.
    """
    path = folder / MANIFEST
    data = read_regular_file(path, MAX_BYTES)
    match = _SEAL.search(data)
    if match is None:
        raise CheckpointError(
            f"{path}: does not end with its own hash, so it is cut off or not a manifest. {_REMEDY}"
        )
    # The hash is of the JSON as `seal` had it, before the hash joined it.
    digest = xxhash.xxh3_128_hexdigest(data[: match.start()] + b"\n}")
    expected_digest = match[1].decode()
    if digest != expected_digest:
        raise CheckpointError(
            f"{path}: changed since it was written: its hash is {digest}, "
            f"expected {expected_digest}. {_REMEDY}"
        )

    try:
        fields = json.loads(data, parse_constant=_refuse_constant)
        fields.pop("xxh3")
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        raise CheckpointError(
            f"{path}: not a manifest that this version reads: {_in_words(error)}. {_REMEDY}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a manifest that this version reads: {error}") from None
    # A folder of another name may be a copy, and is read; one that was renumbered is not.
    name_match = STEP_FOLDER.fullmatch(folder.name)
    if name_match and int(name_match[1]) != manifest.step:
        raise CheckpointError(
            f"{path}: holds step {manifest.step}, but the folder is {folder.name}. Rename it back."
        )
    return manifest


def _refuse_constant(name: str) -> float:
    """For NaN and the infinities, which Python's parser takes although they are not JSON."""
    raise ValueError(f"{name} is not a number")


def _in_words(error: ValidationError) -> str:
    """The first problems, each with its place in the manifest and what stands there."""
    problems = error.errors(include_url=False, include_context=False)
    descriptions = []
    for problem in problems[:5]:
        description = problem["msg"]
        # A validator of the whole manifest names no place.
        if problem["loc"]:
            place = ".".join(map(str, problem["loc"]))
            content = str(problem["input"])[:60]
            description = f"{place}: {description}, found {content}"
        descriptions.append(description)
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(descriptions) + more


def read_regular_file(path: Path, limit: int) -> bytes:
    """The content of a plain file of at most `limit` bytes.

    Raises CheckpointError for a larger one, and as `open_regular_file` does.
    """
    with open_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(
                f"{path}: {size} bytes, more than the {limit} that such a file may have."
            )
        return file.read()


def open_regular_file(path: Path) -> FileIO:
    """Open a plain file for reading, unbuffered.

    Raises CheckpointError for a symbolic link, a device or a pipe, and where it cannot be opened.
    """
    try:
        # O_NONBLOCK, as opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        reason = error.strerror or str(error)
        if path.is_symlink():
            reason = "is a symbolic link, which is not followed"
        raise CheckpointError(f"{path}: {reason}. {_REMEDY}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: not a plain file. {_REMEDY}")
    return os.fdopen(descriptor, "rb", buffering=0)
