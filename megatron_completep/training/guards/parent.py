"""Workers leave with their launcher: an orphan would train on, and hold the output folder's lock."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1


def leave_with_parent(interval_seconds: float = 0.5) -> None:
    """Ask the kernel for SIGKILL when the parent dies, and check as well: it may have died before, or the kernel may be another."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    threading.Thread(target=_watch, args=(parent, interval_seconds), name="parent", daemon=True).start()


def _watch(parent: int, interval_seconds: float) -> None:
    while os.getppid() == parent:
        time.sleep(interval_seconds)
    os.kill(os.getpid(), signal.SIGKILL)
