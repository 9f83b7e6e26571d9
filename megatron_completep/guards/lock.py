"""One trainer an output folder. The lock is the kernel's and ends with the process, however it ends."""

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
    """Held until `release` or the end of the process. POSIX locks: not inherited by forked children, and known to NFS."""

    def __init__(self, folder: Path, wait_seconds: float = 30.0):
        """Wait for a run that is just ending, then raise ConfigError that names the holder. Makes the folder when it is missing."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(
                folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644
            )
        except OSError as error:
            lock = f"{LOCK}: " if error.filename == str(folder / LOCK) else ""
            raise ConfigError(
                f"training.output_dir = {folder} cannot be written: {lock}{error.strerror}. "
                "Choose another folder or change its permissions."
            ) from None
        deadline = time.monotonic() + wait_seconds
        while not self._try():
            if time.monotonic() > deadline:
                holder = self._holder()
                os.close(self._descriptor)
                raise ConfigError(
                    f"training.output_dir = {folder} is in use by process {holder.get('pid', '?')} on "
                    f"{holder.get('host', 'another host')}, started {holder.get('started', 'at an unknown time')}. "
                    "Wait for it, stop it, or choose another folder."
                )
            time.sleep(0.2)
        holder = {
            "pid": os.getpid(),
            "host": platform.node(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        with suppress(
            OSError
        ):  # the lock holds without a name in the file, which a full disk does not take
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _try(self) -> bool:
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _holder(self) -> dict[str, Any]:
        try:
            value = parse_json(os.pread(self._descriptor, 4096, 0), "the lock")
        except DataError:
            return {}
        return value if isinstance(value, dict) else {}
