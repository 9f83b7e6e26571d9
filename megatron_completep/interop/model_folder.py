"""Files of an untrusted Hugging Face folder: each lies in the folder, and JSON is bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_completep.config.json_text import read_json_object
from megatron_completep.errors import DataError


class ModelFolder:
    """A folder whose files are opened by name.

    A name that leads out of the folder, as a path or as a symbolic link, is refused. In Hugging
    Face's own cache, snapshots/REVISION holds links into the blobs/ of the same model; those are
    followed.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def has(self, name: str) -> bool:
        """Whether the folder has an entry of this name.

        A dangling link counts: it must not pass for a missing file.
        """
        if not _is_plain(name):
            return False
        path = self.folder / name
        return path.exists() or path.is_symlink()

    def path(self, name: str) -> Path:
        """Where the file lies. Raises DataError."""
        path = self.folder / name
        if not _is_plain(name):
            raise DataError(f"{self.folder}: {name!r} is no name of a file in this folder.")
        try:
            folder = self.folder.resolve(strict=True)
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):  # a loop of links is a RuntimeError in some versions
            raise DataError(
                f"{path}: there is no such file. Give the folder of a Hugging Face model; "
                "download it again."
            ) from None

        # The layout of the cache: MODEL/snapshots/REVISION/NAME is a link to MODEL/blobs/HASH.
        in_cache = folder.parent.name == "snapshots"
        blobs = folder.parent.parent / "blobs"
        allowed_folders = (folder, blobs) if in_cache else (folder,)
        if target.parent not in allowed_folders:
            raise DataError(
                f"{path}: a symbolic link to {target}, outside of this folder. "
                "Copy the file here if you trust it."
            )
        # Reading a named pipe or a device could wait for ever.
        if not target.is_file():
            raise DataError(f"{path}: not a plain file.")
        return path

    def json_object(self, name: str) -> dict[str, Any]:
        """The JSON object of a file. Raises DataError."""
        return read_json_object(self.path(name))


def _is_plain(name: str) -> bool:
    """Whether a name has no folder in it and can name a file."""
    if name in ("", ".", "..") or "\0" in name:
        return False
    return Path(name).name == name
