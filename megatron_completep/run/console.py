"""Lines for the person watching. A console that takes no more stops nothing: a closed terminal, a reader that left, a full disk."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO


def say_on_stdout(text: str) -> None:
    """At once, even through a pipe."""
    _say(text, sys.stdout)


def say_on_stderr(text: str) -> None:
    """From any rank, at any time: what a guard has to say last."""
    _say(text, sys.stderr)


def _say(text: str, stream: TextIO | None) -> None:
    """What cannot be written is given up, and so is the stream: what other code writes there must not fail either."""
    if stream is None:  # closed before the process began
        return
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):  # ValueError: closed since
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
