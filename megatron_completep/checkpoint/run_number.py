"""Which run this is: a number in the run's folder, by which it knows its snapshots on other disks.

A folder that was moved keeps its number, and a copy gets one of its own. `.run_id` holds, beside
the number, the folder that it was written in. Where the run's folder is another one now, it is a
copy if the old folder still holds this number, and was moved if not.
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
FOLDERS = 100  # earlier folders of a run that are remembered


@dataclass(frozen=True)
class Run:
    """What `.run_id` holds.

    Attributes:
        number: 16 hexadecimal digits.
        folder: the run's, resolved.
        came_from: its earlier folders, oldest first.
        earlier: numbers that it gave up.
    """

    number: str
    folder: str
    came_from: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Run:
        """As another rank sent it, or a file holds it. Raises TypeError, ValueError, KeyError."""
        number = fields["number"]
        folder = fields["folder"]
        came_from = tuple(fields["came_from"])
        earlier = tuple(fields["earlier"])
        # The number becomes part of a folder's name, so a file must not smuggle a path into it.
        if len(number) != 16 or not set(number) <= set("0123456789abcdef"):
            raise ValueError(f"number {number}")
        if not all(isinstance(entry, str) for entry in (folder, *came_from, *earlier)):
            raise TypeError("folders or numbers that are no texts")
        return cls(number, folder, came_from, earlier)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def wrote(self, writer: Writer) -> bool:
        """Whether a snapshot is this run's, from its folder or from an earlier one."""
        # A copy of the run's folder may still have its number; the folder tells the two apart.
        folders = (self.folder, *self.came_from)
        return writer.number == self.number and writer.folder in map(_as_text, folders)

    @property
    def writer(self) -> Writer:
        """What the run's snapshots say of it."""
        return Writer(number=self.number, folder=_as_text(self.folder))


def identify_run(folder: Path) -> tuple[Run, str | None]:
    """The run in `folder`, which `.run_id` remembers from then on, and a line for the user or None.

    Raises CheckpointError when `.run_id` cannot be read or written.
    """
    resolved = str(folder.resolve())
    recorded = _read(folder)
    line = None
    if recorded is None:
        run = _new(resolved)
    elif recorded.folder == resolved:
        run = recorded
    elif _is_copy(recorded, folder):
        run = _new(resolved)
        line = (
            f"{folder} is a copy of the run in {recorded.folder}. "
            f"It has a number of its own now, {run.number}; snapshots stay that run's."
        )
    else:
        # The folder was moved. A run of an earlier version does not know where it was.
        came_from = [earlier for earlier in recorded.came_from if earlier != resolved]
        if recorded.folder:
            came_from.append(recorded.folder)
        run = replace(recorded, folder=resolved, came_from=tuple(came_from[-FOLDERS:]))
    # At the first start, and after the folder was moved or copied.
    if run != recorded:
        _write(folder, run)
    return run, line


def renumber(folder: Path) -> Run:
    """Give the run in `folder` another number, as the one that it had is in use.

    Raises CheckpointError when `.run_id` cannot be read or written.
    """
    # The old number stays known, so that a copy of this folder is still recognized as one.
    before = _read(folder)
    earlier = (*before.earlier, before.number) if before is not None else ()
    run = replace(_new(str(folder.resolve())), earlier=earlier)
    _write(folder, run)
    return run


def _new(folder: str) -> Run:
    return Run(secrets.token_hex(8), folder)


def _is_copy(recorded: Run, folder: Path) -> bool:
    """Whether the folder that the record names is another one and still holds this number."""
    origin = Path(recorded.folder)
    try:
        if not recorded.folder or os.path.samefile(origin, folder):
            return False
        original = _read(origin)
    except (OSError, ValueError, CheckpointError):
        return False
    return original is not None and recorded.number in (original.number, *original.earlier)


def _read(folder: Path) -> Run | None:
    """The record of a folder; None: there is none yet, or an empty file, as a full disk leaves."""
    path = folder / RUN_ID
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(
            f"{path}: not a plain file. Remove it; "
            "snapshots on local disks are then not found again."
        )
    data = read_regular_file(path, MAX_BYTES).strip()
    if not data:
        return None
    try:
        # Earlier versions wrote the number alone.
        if not data.startswith(b"{"):
            number = data.decode("ascii")
            return Run.from_json({"number": number, "folder": "", "came_from": [], "earlier": []})
        return Run.from_json(json.loads(data))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CheckpointError(
            f"{path}: not a run's number. Remove it; "
            "snapshots on local disks are then not found again."
        ) from None


def _write(folder: Path, run: Run) -> None:
    path = folder / RUN_ID
    try:
        write_whole(path, json.dumps(run.to_json(), indent=1).encode() + b"\n")
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}. Free some space, or choose another "
            "training.output_dir."
        ) from None


def _as_text(folder: str) -> str:
    """A path as a manifest holds it, with bytes that are no UTF-8 as escape sequences."""
    return os.fsencode(folder).decode("utf-8", "backslashreplace")
