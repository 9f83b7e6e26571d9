"""What a program is about to write is checked before its work: no input is lost, nothing else is replaced unasked."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_completep.errors import UserError

MARK = "made by megatron-completep"  # stands near the beginning of every report and picture of the project
_MARK_WITHIN = 4096  # bytes


@dataclass(frozen=True)
class Output:
    """A file or folder that a program will write.

    option: the argument that named it. folder: a folder is meant, in which the program has names of its own. renewed: a file that
    carries the project's mark, a report or a picture, is replaced without being asked.
    """

    option: str
    path: Path
    folder: bool = False
    renewed: bool = False


def check_outputs(
    outputs: Sequence[Output], inputs: Iterable[str | Path] = (), overwrite: bool = False
) -> None:
    """UserError, with all problems, where an output cannot be written, is an input or another output, or would replace something.

    inputs: files and folders that the program reads; those that do not exist count for nothing. overwrite: replace what is there.
    """
    read: dict[object, str | Path] = {_identity(Path(path)): path for path in inputs}
    read.pop(None, None)
    problems: list[str] = []
    seen: dict[object, Output] = {}
    for output in outputs:
        problem = _cannot_be_written(output)
        identity: object = _identity(output.path) or os.path.realpath(output.path)
        if problem is None and identity in read:
            problem = (
                f"is an input as well ({read[identity]}): it would be lost. Choose another name."
            )
        elif problem is None and not output.folder:
            if identity in seen:
                problem = f"is named twice, the second time as {seen[identity].path}. Give every output a name of its own."
            elif (
                output.path.exists()
                and not overwrite
                and not (output.renewed and is_ours(output.path))
            ):
                problem = "exists. Choose another name, or replace it with --overwrite."
        seen[identity] = output
        if problem is not None:
            problems.append(f"{output.option} = {output.path}: {problem}")
    problems = list(dict.fromkeys(problems))
    if len(problems) > 1:
        raise UserError(
            "\n".join([f"{len(problems)} problems", *(f"  {problem}" for problem in problems)])
        )
    if problems:
        raise UserError(problems[0])


def is_ours(path: Path) -> bool:
    """Whether a file carries the project's mark."""
    try:
        with open(path, "rb") as file:
            return MARK.encode() in file.read(_MARK_WITHIN)
    except OSError:
        return False


def _identity(path: Path) -> tuple[int, int] | None:
    """What two names of the same file share; None where there is no file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _cannot_be_written(output: Output) -> str | None:
    """Why, from what stands at the path and above it. Nothing stays there."""
    path, wanted = output.path, "a folder" if output.folder else "a file"
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "the name is not UTF-8. Choose another one."
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return f"cannot be written: {reason}. Choose another name."
    if mode is not None:
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return f"is no regular file (a pipe or a device). Name {wanted}."
        if stat.S_ISDIR(mode) != output.folder:
            return f"is {'a folder' if stat.S_ISDIR(mode) else 'a file'}, but {wanted} is to be written. Choose another name."
    above = path if output.folder and mode is not None else path.parent
    while not os.path.lexists(above) and above != above.parent:
        above = above.parent
    if not above.is_dir():
        return f"cannot be written: {above} is no folder. Choose another one."
    if not os.access(above, os.W_OK | os.X_OK) or (
        mode is not None and not os.access(path, os.W_OK)
    ):
        return f"cannot be written: you may not write into {above}. Choose another folder."
    try:
        with tempfile.NamedTemporaryFile(
            dir=above
        ):  # only trying tells of file systems that take no files, such as /proc
            return None
    except OSError as error:
        return (
            f"cannot be written: {above} takes no file ({error.strerror}). Choose another folder."
        )
