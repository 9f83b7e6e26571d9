"""Which run this is: a number in the run's folder, by which snapshots on other disks are known to be its own.

A folder that was moved keeps its number, a copy gets one of its own. `.run_id` holds the folder it was written in, by which the two
are told apart: it is another one now, and the old one still holds this number (a copy) or does not (moved).
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_completep.checkpoint.manifest import Writer, read_regular_file
from megatron_completep.errors import CheckpointError
from megatron_completep.files import write_whole

RUN_ID = ".run_id"
MAX_BYTES = 1 << 20
FOLDERS = 100  # in which a run was before that are remembered


@dataclass(frozen=True)
class Run:
    """number: of 16 hexadecimal digits. folder: the run's, resolved. came_from: the folders in which it was before, oldest first.
    earlier: numbers that it gave up."""

    number: str
    folder: str
    came_from: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Run:
        """As another rank sent it, or a file holds it. Raises TypeError, ValueError, KeyError."""
        number, folder, came_from, earlier = (
            value["number"],
            value["folder"],
            tuple(value["came_from"]),
            tuple(value["earlier"]),
        )
        if len(number) != 16 or not set(number) <= set("0123456789abcdef"):
            raise ValueError(f"number {number}")
        if not all(isinstance(text, str) for text in (folder, *came_from, *earlier)):
            raise TypeError("folders or numbers that are no texts")
        return cls(number, folder, came_from, earlier)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def wrote(self, writer: Writer) -> bool:
        """Whether a snapshot is this run's, from here or from where it was before."""
        return writer.number == self.number and writer.folder in (
            _as_text(self.folder),
            *map(_as_text, self.came_from),
        )

    @property
    def writer(self) -> Writer:
        """What its snapshots say of it."""
        return Writer(number=self.number, folder=_as_text(self.folder))


def identify_run(folder: Path) -> tuple[Run, str | None]:
    """The run in `folder`, remembered there, and what is to be said. CheckpointError: `.run_id` cannot be read, or written."""
    here = str(folder.resolve())
    recorded = _read(folder)
    if recorded is None or recorded.folder == here:
        run, said = recorded or _new(here), None
    elif _is_copy(recorded, folder):
        run = _new(here)
        said = f"{folder} is a copy of the run in {recorded.folder}. It has a number of its own now, {run.number}; snapshots stay that run's."
    else:
        before = (
            *(f for f in recorded.came_from if f != here),
            *([recorded.folder] if recorded.folder else []),
        )
        run, said = replace(recorded, folder=here, came_from=before[-FOLDERS:]), None
    if run != recorded:
        _write(folder, run)
    return run, said


def renumber(folder: Path) -> Run:
    """Another number for the run in `folder`: the one it had is in use. Raises CheckpointError."""
    before = _read(folder)
    run = replace(
        _new(str(folder.resolve())),
        earlier=(*before.earlier, before.number) if before is not None else (),
    )
    _write(folder, run)
    return run


def _new(here: str) -> Run:
    return Run(secrets.token_hex(8), here)


def _is_copy(recorded: Run, folder: Path) -> bool:
    """Whether the folder that the record names is another one and still holds this number."""
    origin = Path(recorded.folder)
    try:
        if not recorded.folder or os.path.samefile(origin, folder):
            return False
        other = _read(origin)
    except (OSError, ValueError, CheckpointError):
        return False
    return other is not None and recorded.number in (other.number, *other.earlier)


def _read(folder: Path) -> Run | None:
    """None: there is none yet, or only an empty file, which a full disk once left."""
    path = folder / RUN_ID
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(
            f"{path}: not a plain file. Remove it; snapshots on local disks are then not found again."
        )
    data = read_regular_file(path, MAX_BYTES).strip()
    if not data:
        return None
    try:
        if not data.startswith(b"{"):  # the number alone, as runs of before have it
            return Run.from_json(
                {"number": data.decode("ascii"), "folder": "", "came_from": [], "earlier": []}
            )
        return Run.from_json(json.loads(data))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CheckpointError(
            f"{path}: not a run's number. Remove it; snapshots on local disks are then not found again."
        ) from None


def _write(folder: Path, run: Run) -> None:
    path = folder / RUN_ID
    try:
        write_whole(path, json.dumps(run.to_json(), indent=1).encode() + b"\n")
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}. Free some space, or choose another training.output_dir."
        ) from None


def _as_text(folder: str) -> str:
    """A path as a manifest holds it, which is text: bytes that are none are written out."""
    return os.fsencode(folder).decode("utf-8", "backslashreplace")
