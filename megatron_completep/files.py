"""Files and folders that appear whole or not at all, whatever ends the process or fills the disk meanwhile."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FILLING = ".filling"


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace a file in one move; what it held before stays until all of `data` is on the disk. OSError: then nothing is left behind."""
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
        if isinstance(error, OSError):
            raise OSError(
                error.errno, error.strerror, str(target)
            ) from None  # that of a write names no file
        raise
    sync_folder(target.parent)


def append_line(path: str | os.PathLike[str], line: bytes) -> None:
    """Add a line to a small file, on the disk before this returns; what a kill left of a last line goes. OSError: nothing was added."""
    with open(path, "a+b", buffering=0) as file:
        file.seek(0)
        whole_lines = file.read().rfind(b"\n") + 1
        file.truncate(whole_lines)
        try:
            if file.write(line + b"\n") <= len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(whole_lines)
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
    """A temporary folder beside `target` that takes its name when the block ends well, and is removed when it does not.

    What a killed process left of an attempt at the same target is removed first. A folder that is being filled holds a file that
    the kernel locks for its process, and so is never taken for such a remainder. Raises OSError; FileExistsError: `target` is there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for entry in target.parent.iterdir():
        remainder = (
            entry.name.startswith(f".{target.name}.") and entry.is_dir() and not entry.is_symlink()
        )
        if remainder and not is_being_filled(entry):
            shutil.rmtree(entry, ignore_errors=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        with open(temporary / FILLING, "xb") as marker:
            fcntl.lockf(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield temporary
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            (temporary / FILLING).unlink()
            sync_folder(temporary)
            os.rename(temporary, target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def is_being_filled(folder: Path) -> bool:
    """Whether a living process fills this folder (see `new_folder`), or that cannot be told."""
    try:
        marker = os.open(folder / FILLING, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.lockf(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(marker)
    return False
