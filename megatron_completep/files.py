"""Files and folders that appear whole or not at all, even when the process or the disk fails."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

FILLING = ".filling"


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """As many of each path's last names as tell all paths apart; equal paths are numbered."""
    split_paths = [path.absolute().parts for path in paths]
    longest = max(map(len, split_paths), default=1)
    for length in range(1, longest + 1):
        names = ["/".join(names_of_path[-length:]) for names_of_path in split_paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, start=1)]


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace a file in one move: its old content stays until all of `data` is on the disk.

    Raises OSError, with the path in it; then the file is as before and nothing else is left behind.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(2)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        # The error of a write names no file, and that of `open` the temporary one.
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(target)) from None
        raise
    sync_folder(target.parent)


def append_line(path: str | os.PathLike[str], line: bytes) -> None:
    """Add a line to a small file, on the disk before this returns.

    An incomplete last line, which a killed process may leave, is removed first. Raises OSError,
    with the path in it; then nothing was added.
    """
    with open(path, "a+b", buffering=0) as file:
        file.seek(0)
        end_of_lines = file.read().rfind(b"\n") + 1
        file.truncate(end_of_lines)
        try:
            # On a full disk a write may take fewer bytes than it was given, without an error.
            if file.write(line + b"\n") <= len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(end_of_lines)
            raise OSError(error.errno, error.strerror, str(path)) from None


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that a rename or a new file in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that takes its name when the block ends well.

    When the block raises, the folder is removed. What a killed process left of an attempt at the
    same target is removed first; a folder that a living process fills is never taken for that,
    since it holds a file that the kernel locks for its process. Raises OSError, and FileExistsError
    where `target` exists.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for entry in target.parent.iterdir():
        if not entry.name.startswith(f".{target.name}."):
            continue
        if entry.is_dir() and not entry.is_symlink() and not is_being_filled(entry):
            shutil.rmtree(entry, ignore_errors=True)

    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        with open(temporary / FILLING, "xb") as marker:
            fcntl.lockf(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield temporary

            # A rename would replace an empty folder of that name without a word.
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            (temporary / FILLING).unlink()
            # The content must be on the disk before its name, or a power cut leaves it incomplete.
            sync_folder(temporary)
            os.rename(temporary, target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def is_being_filled(folder: Path) -> bool:
    """Whether a living process fills this folder (see `new_folder`), or it cannot be found out."""
    try:
        marker = os.open(folder / FILLING, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    # The kernel releases a lock when its process ends, however it ends: what can be locked is old.
    try:
        fcntl.lockf(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(marker)
    return False
