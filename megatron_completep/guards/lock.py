"""One trainer per output folder.

The lock is the operating system's, so it ends with the process, however the process ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_completep.config.json_text import parse_json
from megatron_completep.errors import ConfigError, DataError

LOCK = ".lock"


class OutputLock:
    """A lock on an output folder, held until `release` or the end of the process.

    It is a POSIX lock: forked children do not inherit it, and NFS supports it.
    """

    def __init__(self, folder: Path, wait_seconds: float = 30.0):
        """Take the lock of `folder`, which is made where it is missing.

        wait_seconds: how long to wait for a run that is about to end.

        Raises:
            ConfigError: the folder cannot be written, or another process holds the lock; the
                message names it.
        """
        path = folder / LOCK
        # Never through a symbolic link, which would create a file elsewhere.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, flags, 0o644)
        except OSError as error:
            # The folder is named anyway; of its files the lock is what the user does not know of.
            lock = f"{LOCK}: " if error.filename == str(path) else ""
            raise ConfigError(
                f"training.output_dir = {folder} cannot be written: {lock}{error.strerror}. "
                "Choose another folder or change its permissions."
            ) from None

        deadline = time.monotonic() + wait_seconds
        while not self._try():
            if time.monotonic() > deadline:
                message = self._in_use(folder)
                os.close(self._descriptor)
                raise ConfigError(message)
            time.sleep(0.2)
        # For whoever finds the folder in use.
        self._write_holder()

    def release(self) -> None:
        """Let another process have the folder. Calling it again does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _try(self) -> bool:
        """Take the lock unless another process has it."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # systems differ in which of the two it is
            return False
        return True

    def _in_use(self, folder: Path) -> str:
        """The message that names the process which holds the lock, as far as the file tells."""
        holder = self._read_holder()
        pid = holder.get("pid", "?")
        host = holder.get("host", "another host")
        started = holder.get("started", "at an unknown time")
        return (
            f"training.output_dir = {folder} is in use by process {pid} on {host}, "
            f"started {started}. Wait for it, stop it, or choose another folder."
        )

    def _write_holder(self) -> None:
        holder = {
            "pid": os.getpid(),
            "host": platform.node(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        # A full disk does not take these bytes, but the lock holds without them.
        with suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def _read_holder(self) -> dict[str, Any]:
        """What `_write_holder` wrote, or nothing where the file holds anything else."""
        try:
            holder = parse_json(os.pread(self._descriptor, 4096, 0), "the lock")
        except DataError:
            return {}
        return holder if isinstance(holder, dict) else {}
