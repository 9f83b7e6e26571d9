"""Files as a user names them: only regular ones are read, names need not be UTF-8, and JSON may be hostile."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from megatron_completep.errors import DataError

_KINDS = (
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISDIR, "a folder"),
)


def printable(name: str | os.PathLike[str]) -> str:
    """A file name for messages, reports and JSON: bytes that are not UTF-8 are written as \\xNN, everything else stays."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def require_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """The status of a regular file. Raises DataError that names anything else (opening a pipe would wait for its writer), or OSError.

    Files are read in parts, by several processes, and again after an interruption; a pipe gives its content once.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "something else")
        raise DataError(
            f"{printable(path)}: is {kind}, not a regular file. Write its content to a file and name that."
        )
    return status


def read_json(path: Path) -> Any:
    """The value in a small JSON file. Raises ValueError where it is none (nested too deeply included), OSError, and DataError
    where it is no regular file."""
    require_regular(path)
    try:
        return json.loads(path.read_text("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
