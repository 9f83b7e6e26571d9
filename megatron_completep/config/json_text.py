"""JSON from files that anybody may have written.

It is bounded in size and depth, its numbers are finite, and every error names the file.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from megatron_completep.errors import DataError, UserError

MAX_BYTES = 64 << 20  # of a file; the index of a model of 10^12 parameters is a few MB
# Of brackets in brackets; beyond it the code that walks over values would run out of stack.
MAX_DEPTH = 100


def parse_json(
    text: str | bytes, name: str, error: type[UserError] = DataError, finite: bool = True
) -> Any:
    """The value of one JSON document.

    Args:
        text: the document.
        name: what to call it in messages, such as the file's path.
        error: the kind of error that is raised.
        finite: refuse NaN, Infinity and numbers that float64 cannot hold. The project's own logs of
            training may hold them.

    Raises:
        UserError: of the kind `error`: not JSON, nested too deeply, or not finite.
    """
    too_deep = f"{name}: not usable JSON: brackets are nested more than {MAX_DEPTH} deep."
    try:
        if finite:
            document = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        else:
            document = json.loads(text)
    except RecursionError:
        raise error(too_deep) from None
    # A ValueError is no JSON, no UTF-8, not finite, or an integer of thousands of digits.
    except ValueError as problem:
        raise error(f"{name}: not JSON ({problem}).") from None
    if _is_deep(text, document):
        raise error(too_deep)
    return document


def read_json(
    path: str | os.PathLike[str], error: type[UserError] = DataError, finite: bool = True
) -> Any:
    """The value of a JSON file of at most MAX_BYTES, as `parse_json`.

    Raises an error of the kind `error` for a file that cannot be read, too.
    """
    content = read_bounded(path, MAX_BYTES, error)
    return parse_json(content, str(path), error, finite)


def read_json_object(
    path: str | os.PathLike[str], error: type[UserError] = DataError, finite: bool = True
) -> dict[str, Any]:
    """As `read_json`; anything but an object is an error."""
    document = read_json(path, error, finite)
    if not isinstance(document, dict):
        raise error(f"{path}: not a JSON object.")
    return document


def read_bounded(
    path: str | os.PathLike[str], limit: int, error: type[UserError] = DataError
) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    It never waits for a pipe or a device. Raises an error of the kind `error`.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{path} cannot be read: it is not a plain file.")
            # One byte more than allowed tells that a file is too long, even one that grows.
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(limit + 1)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else str(problem)
        raise error(f"{Path(path)} cannot be read: {reason}.") from None
    if len(content) > limit:
        raise error(
            f"{path}: {status.st_size:,} bytes, more than the {limit:,} that such a file may have."
        )
    return content


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is larger than any float64")
    return number


def _is_deep(text: str | bytes, document: Any) -> bool:
    """Whether brackets are nested deeper than MAX_DEPTH."""
    # Most documents have fewer brackets than that, and need no walk.
    if isinstance(text, str):
        brackets = text.count("[") + text.count("{")
    else:
        brackets = text.count(b"[") + text.count(b"{")
    if brackets <= MAX_DEPTH:
        return False

    # Level by level, not recursively: the document may be as deep as the stack allows.
    containers = [document] if isinstance(document, dict | list) else []
    depth = 0
    while containers:
        depth += 1
        if depth > MAX_DEPTH:
            return True
        children: list[Any] = []
        for container in containers:
            children += container.values() if isinstance(container, dict) else container
        containers = [child for child in children if isinstance(child, dict | list)]
    return False
