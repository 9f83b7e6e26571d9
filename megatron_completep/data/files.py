"""Files as a user names them.

Only regular ones are read, names need not be UTF-8, and JSON may be hostile.
"""

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
    """A file name for messages, reports and JSON: bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def require_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """The status of a regular file.

    Files are read in segments, by several processes, and again after an interruption; a pipe gives
    its content once, and opening it would wait for its writer. Raises DataError that names what the
    file is instead, or OSError.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kinds = [kind for is_kind, kind in _KINDS if is_kind(status.st_mode)]
        kind = kinds[0] if kinds else "something else"
        raise DataError(
            f"{printable(path)}: is {kind}, not a regular file. "
            "Write its content to a file and name that."
        )
    return status


def read_json(path: Path) -> Any:
    """The value in a small JSON file.

    Raises ValueError where it is no JSON or nested too deeply, OSError, and DataError where it is
    no regular file.
    """
    require_regular(path)
    try:
        return json.loads(path.read_text("utf-8"))
    # Brackets in brackets without end exhaust the parser's stack.
    except RecursionError:
        raise ValueError("nested too deeply") from None
