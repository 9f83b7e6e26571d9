"""Lines for the person who watches a run.

A console that can no longer be written to does not stop the run: the terminal may be closed, the
reader of a pipe may have left, a disk may be full.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO


def say_on_stdout(text: str) -> None:
    """Print a line and flush it, so that it arrives through a pipe at once."""
    _say(text, sys.stdout)


def say_on_stderr(text: str) -> None:
    """Print a line on stderr. Any rank may do so at any time, a guard before it ends the run."""
    _say(text, sys.stderr)


def _say(text: str, stream: TextIO | None) -> None:
    """Print a line; after a failure the stream is led to /dev/null.

    Otherwise other code that prints there would fail, too.
    """
    if stream is None:  # closed before the process began
        return
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):  # ValueError: closed since
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
