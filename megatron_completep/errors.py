"""The errors that a user can cause, and how a command-line program ends with one.

Each message says where, which value, which rule, and what to do.
"""

import errno
import hashlib
import json
import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

INTERRUPTED = 128 + 2  # exit code, as a shell reports SIGINT
BROKEN_PIPE = 128 + 13  # exit code, as a shell reports SIGPIPE
# What the machine refuses whatever the program does: a traceback helps nobody against it.
REFUSED_BY_THE_MACHINE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
}

# How Python holds a byte of a file's name that is not UTF-8.
_ESCAPED_BYTE = re.compile("[\\udc80-\\udcff]")

_SIZES = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


class UserError(Exception):
    """A mistake in what the user handed in: printed as it is, without a traceback, exit code 2."""

    exit_code = 2


class ConfigError(UserError):
    """The configuration cannot be used; the message lists every problem found."""


class DataError(UserError):
    """A corpus, token file or tokenizer cannot be used; the message names file and field."""


class CheckpointError(UserError):
    """A checkpoint cannot be written or read; the message names file, expected and found value."""


class ExpertsDoNotFit(UserError):
    """The tokens that came to a rank's experts do not fit; the message names step, layer, load."""


def size_text(number: int) -> str:
    """A number of bytes for people: 7.5 MB."""
    for unit, size in _SIZES:
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"


def pairs_text(values: Mapping[str, object]) -> str:
    """A mapping for people: tensor 2, data 4."""
    pairs = []
    for name, quantity in values.items():
        if isinstance(quantity, float):
            pairs.append(f"{name} {quantity:g}")
        else:
            pairs.append(f"{name} {quantity}")
    return ", ".join(pairs)


def for_all(items: Iterable[Item], use: Callable[[Item], Result]) -> list[Result]:
    """`use` of each item, in order.

    User errors of several items are raised together, as one error of the first one's kind.
    """
    results = []
    problems: list[UserError] = []
    for item in items:
        try:
            results.append(use(item))
        except UserError as problem:
            problems.append(problem)
    if len(problems) > 1:
        lines = [f"{len(problems)} problems", *(f"  {problem}" for problem in problems)]
        raise type(problems[0])("\n".join(lines))
    if problems:
        raise problems[0]
    return results


@contextmanager
def when_interrupted(sentence: str) -> Iterator[None]:
    """Give Ctrl-C inside the block a sentence, which says what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt(*(interruption.args or (sentence,))) from None


def exit_on_user_error(main: Callable[[], int | None]) -> None:
    """Run a command-line program's `main` and leave with its exit code.

    A user's mistake, and a file that the machine refuses, print one message and exit with 2. Ctrl-C
    prints one sentence and exits with 130; the sentence is that of `when_interrupted` where the
    program knows what is kept. A reader of stdout that has gone away makes the exit code 141.
    """
    _print_any_text()
    try:
        code = main()
        # Flushed here, so that a full disk or a broken pipe is met inside this block and not when
        # Python shuts down. Python has no stdout where the caller has closed it (>&-).
        if sys.stdout is not None:
            sys.stdout.flush()
    except UserError as error:
        say_once(f"error: {error}")
        code = error.exit_code
    except KeyboardInterrupt as interruption:
        say_once(f"interrupted: {interruption}" if interruption.args else "interrupted")
        code = INTERRUPTED
    except BrokenPipeError:
        if not _reader_left():
            raise
        code = BROKEN_PIPE
    except OSError as error:
        # Without a file's name the message could not say where: then the traceback says more.
        name = error.filename
        if name is None and _stdout_is_full(error):
            name = "standard output"
        if error.errno not in REFUSED_BY_THE_MACHINE or name is None:
            raise
        say_once(
            f"error: {name}: {error.strerror}. "
            "Free some space or permit it, or choose another place."
        )
        code = UserError.exit_code
    sys.exit(code or 0)


def say_once(message: str) -> None:
    """Print on stderr why this process ends, once a node.

    Of the ranks that torchrun started on a node, only one prints a message that they all have. The
    message goes into torchrun's error file too: torchrun's own report then ends with it instead of
    a pointer to torch's documentation.
    """
    # A file's name need not be UTF-8; its other bytes are shown as \\xNN.
    message = _ESCAPED_BYTE.sub(lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", message)
    message = message.encode(errors="backslashreplace").decode()
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt_0/LOCAL_RANK/error.json
    if not error_file:
        _print_on_stderr(message)
        return

    # The ranks of a node share the folder of the attempt: the first to create the file prints.
    path = Path(error_file)
    digest = hashlib.blake2b(message.encode(), digest_size=12).hexdigest()
    claim = path.parent.parent / f"said_{digest}"
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
        is_first = True
    except FileExistsError:
        is_first = False
    except OSError:  # printing twice is better than not at all
        is_first = True
    if is_first:
        _print_on_stderr(message)

    # torchrun reports the rank with the earliest time stamp as the cause: the one that printed.
    record = {
        "message": message if is_first else "as another rank of this node says",
        "timestamp": int(time.time()) + (not is_first),
    }
    try:
        path.write_text(json.dumps(record), encoding="utf-8")
    except OSError:
        return  # the message is on stderr already


def _print_on_stderr(message: str) -> None:
    """Print; a terminal that is gone does not change the exit code."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def _print_any_text() -> None:
    """Let stdout print an escape where it would fail.

    Names of files need not be UTF-8, and a terminal need not know every letter.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _stdout_is_full(error: OSError) -> bool:
    """Whether the error is of a stdout that takes no more: a full disk, a quota.

    It is tried with a line end. Where that fails, stdout becomes the null device, so that Python
    does not fail again when it flushes stdout at its end.
    """
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or sys.stdout is None:
        return False
    try:
        stdout = sys.stdout.fileno()
    except OSError:  # a stand-in without a file
        return False
    try:
        os.write(stdout, b"\n")
        return False
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
        return True


def _reader_left() -> bool:
    """Whether the broken pipe is stdout: its reader (`head`, a pager) has gone away.

    Then stdout becomes the null device, so that Python does not fail again when it flushes it.
    """
    try:
        stdout = sys.stdout.fileno()
    except OSError:  # a stand-in without a file
        return False
    poll = select.poll()
    poll.register(stdout, select.POLLOUT)
    is_broken = any(event & select.POLLERR for _, event in poll.poll(0))
    if not is_broken:
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True
