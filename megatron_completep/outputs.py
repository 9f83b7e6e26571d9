"""Checks of what a program is about to write, before its work: no input is lost, nothing replaced.

What exists is replaced only where the user asked for it, or where the project made it.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_completep.errors import UserError

# Stands near the beginning of every report and picture of the project.
MARK = "made by megatron-completep"
_MARK_WITHIN = 4096  # bytes


@dataclass(frozen=True)
class Output:
    """A file or folder that a program will write.

    option: the argument that named it. folder: a folder is meant, in which the program has names of
    its own. renewed: a file that carries the project's mark, a report or a picture, is replaced
    without being asked.
    """

    option: str
    path: Path
    folder: bool = False
    renewed: bool = False


def check_outputs(
    outputs: Sequence[Output], inputs: Iterable[str | Path] = (), overwrite: bool = False
) -> None:
    """Refuse outputs that cannot be written, or that would replace an input or something else.

    inputs: files and folders that the program reads; those that do not exist count for nothing.
    overwrite: replace what exists.

    Raises UserError with all problems: an output cannot be written, is an input or another output,
    or exists.
    """
    # One file may have several names; its device and inode number are the same for all of them.
    input_paths: dict[object, str | Path] = {_identity(Path(path)): path for path in inputs}
    input_paths.pop(None, None)
    earlier_outputs: dict[object, Output] = {}
    problems: list[str] = []
    for output in outputs:
        identity: object = _identity(output.path) or os.path.realpath(output.path)
        problem = _cannot_be_written(output)
        if problem is None and identity in input_paths:
            problem = (
                f"is an input as well ({input_paths[identity]}): it would be lost. "
                "Choose another name."
            )
        # In a folder the program has names of its own, so two outputs may share it.
        elif problem is None and not output.folder:
            problem = _would_replace(output, earlier_outputs.get(identity), overwrite)
        earlier_outputs[identity] = output
        if problem is not None:
            problems.append(f"{output.option} = {output.path}: {problem}")

    problems = list(dict.fromkeys(problems))
    if len(problems) > 1:
        lines = [f"{len(problems)} problems", *(f"  {problem}" for problem in problems)]
        raise UserError("\n".join(lines))
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
    """What two names of the same file share, its device and inode; None where there is no file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _would_replace(output: Output, earlier: Output | None, overwrite: bool) -> str | None:
    """Why a file may not be written over what is there, or over an output that was named before."""
    if earlier is not None:
        return (
            f"is named twice, the second time as {earlier.path}. "
            "Give every output a name of its own."
        )
    if not output.path.exists() or overwrite:
        return None
    if output.renewed and is_ours(output.path):
        return None
    return "exists. Choose another name, or replace it with --overwrite."


def _cannot_be_written(output: Output) -> str | None:
    """Why an output cannot be written, from what stands at its path and above it.

    Nothing stays of the attempt.
    """
    path = output.path
    kind = "a folder" if output.folder else "a file"
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

    # What exists must be of the kind that the program writes.
    if mode is not None:
        is_folder = stat.S_ISDIR(mode)
        if not (stat.S_ISREG(mode) or is_folder):
            return f"is no regular file (a pipe or a device). Name {kind}."
        if is_folder != output.folder:
            present_kind = "a folder" if is_folder else "a file"
            return f"is {present_kind}, but {kind} is to be written. Choose another name."

    # Of what does not exist, the nearest folder above decides.
    above = path if output.folder and mode is not None else path.parent
    while not os.path.lexists(above) and above != above.parent:
        above = above.parent
    if not above.is_dir():
        return f"cannot be written: {above} is no folder. Choose another one."
    takes_entries = os.access(above, os.W_OK | os.X_OK)
    takes_content = mode is None or os.access(path, os.W_OK)
    if not (takes_entries and takes_content):
        return f"cannot be written: you may not write into {above}. Choose another folder."

    # Permissions do not tell of file systems that take no files, such as /proc: only trying does.
    try:
        with tempfile.NamedTemporaryFile(dir=above):
            return None
    except OSError as error:
        return (
            f"cannot be written: {above} takes no file ({error.strerror}). Choose another folder."
        )
