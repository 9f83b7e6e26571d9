"""JSON from files that anybody may have written: bounded in size and depth, finite numbers; every error names the file."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from megatron_completep.errors import DataError, UserError

MAX_BYTES = 64 << 20  # of a file; the index of a model of 10^12 parameters is a few MB
MAX_DEPTH = (
    100  # of brackets in brackets; beyond it the code that walks over values would run out of stack
)


def parse_json(
    text: str | bytes, name: str, error: type[UserError] = DataError, finite: bool = True
) -> Any:
    """The value of one JSON document.

    Args:
        text: the document.
        name: what to call it in messages, such as the file's path.
        error: the kind of error that is raised.
        finite: refuse NaN, Infinity and numbers that float64 cannot hold. Our own logs of training may hold them.

    Raises:
        UserError: of the kind `error`: not JSON, nested too deeply, or not finite.
    """
    try:
        value = (
            json.loads(text, parse_constant=_refuse, parse_float=_finite)
            if finite
            else json.loads(text)
        )
    except RecursionError:
        raise error(
            f"{name}: not usable JSON: brackets are nested more than {MAX_DEPTH} deep."
        ) from None
    except (
        ValueError
    ) as problem:  # what is no JSON, no UTF-8, not finite, or an integer of thousands of digits
        raise error(f"{name}: not JSON ({problem}).") from None
    if _is_deep(text, value):
        raise error(f"{name}: not usable JSON: brackets are nested more than {MAX_DEPTH} deep.")
    return value


def read_json(
    path: str | os.PathLike[str], error: type[UserError] = DataError, finite: bool = True
) -> Any:
    """The value of a JSON file of at most MAX_BYTES; as `parse_json`. A file that cannot be read is an error of the kind `error`."""
    return parse_json(read_bounded(path, MAX_BYTES, error), str(path), error, finite)


def read_json_object(
    path: str | os.PathLike[str], error: type[UserError] = DataError, finite: bool = True
) -> dict[str, Any]:
    """As `read_json`; anything but an object is an error."""
    value = read_json(path, error, finite)
    if not isinstance(value, dict):
        raise error(f"{path}: not a JSON object.")
    return value


def read_bounded(
    path: str | os.PathLike[str], limit: int, error: type[UserError] = DataError
) -> bytes:
    """The bytes of a plain file of at most `limit` bytes; a pipe or device is never waited for. Raises `error`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{path} cannot be read: it is not a plain file.")
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(limit + 1)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else str(problem)
        raise error(f"{Path(path)} cannot be read: {reason}.") from None
    if len(data) > limit:
        raise error(
            f"{path}: {status.st_size:,} bytes, more than the {limit:,} that such a file may have."
        )
    return data


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is larger than any float64")
    return value


def _is_deep(text: str | bytes, value: Any) -> bool:
    """Whether brackets are nested deeper than MAX_DEPTH; most documents have fewer brackets than that."""
    brackets = (
        text.count("[") + text.count("{")
        if isinstance(text, str)
        else text.count(b"[") + text.count(b"{")
    )
    if brackets <= MAX_DEPTH:
        return False
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            return True
        level = [
            inner for item in level for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return False
