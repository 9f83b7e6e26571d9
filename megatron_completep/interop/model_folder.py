"""The files of a Hugging Face folder, which a stranger made: each lies in the folder, JSON is bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_completep.config.json_text import read_json_object
from megatron_completep.errors import DataError


class ModelFolder:
    """A folder whose files are opened by name. A name that leads out of it, as a path or as a symbolic link, is refused.

    In Hugging Face's own cache, snapshots/REVISION holds links into the blobs/ of the same model; those are followed.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def has(self, name: str) -> bool:
        """Whether there is something of this name, a dangling link included: it must not pass for a missing file."""
        return _is_plain(name) and (
            (self.folder / name).exists() or (self.folder / name).is_symlink()
        )

    def path(self, name: str) -> Path:
        """Where the file lies. Raises DataError."""
        path = self.folder / name
        if not _is_plain(name):
            raise DataError(f"{self.folder}: {name!r} is no name of a file in this folder.")
        try:
            folder, real = self.folder.resolve(strict=True), path.resolve(strict=True)
        except (OSError, RuntimeError):  # a loop of links is a RuntimeError in some versions
            raise DataError(
                f"{path}: there is no such file. Give the folder of a Hugging Face model; download it again."
            ) from None
        blobs = folder.parent.parent / "blobs"
        if real.parent != folder and not (
            folder.parent.name == "snapshots" and real.parent == blobs
        ):
            raise DataError(
                f"{path}: a symbolic link to {real}, outside of this folder. Copy the file here if you trust it."
            )
        if not real.is_file():
            raise DataError(f"{path}: not a plain file.")
        return path

    def json_object(self, name: str) -> dict[str, Any]:
        """The JSON object of a file. Raises DataError."""
        return read_json_object(self.path(name))


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and "\0" not in name and Path(name).name == name
