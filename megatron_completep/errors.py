"""The errors a user can cause. Each message says where, which value, which rule, and what to do."""

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

Thing = TypeVar("Thing")
Result = TypeVar("Result")

INTERRUPTED = 128 + 2  # as a shell reports SIGINT
BROKEN_PIPE = 128 + 13  # and SIGPIPE
# What a machine refuses whatever the program does: no traceback helps against it.
REFUSED_BY_THE_MACHINE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
}

_ESCAPED_BYTE = re.compile(
    "[\\udc80-\\udcff]"
)  # how Python holds a byte of a file's name that is not UTF-8


class UserError(Exception):
    """A mistake in what the user handed in: printed as it is, without a traceback, exit code 2."""

    exit_code = 2


class ConfigError(UserError):
    """The configuration cannot be used; the message lists every problem found."""


class DataError(UserError):
    """A corpus, token file or tokenizer cannot be used; the message names file and field."""


class CheckpointError(UserError):
    """A checkpoint cannot be written or read; the message names file, expected and found value."""


def size_text(number: int) -> str:
    """A number of bytes for people: 7.5 MB."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"


def pairs_text(values: Mapping[str, object]) -> str:
    """A mapping for people: tensor 2, data 4."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


def for_all(things: Iterable[Thing], use: Callable[[Thing], Result]) -> list[Result]:
    """`use` of each thing. The user's mistakes in several of them are raised together, as one error of the first one's kind."""
    results, problems = [], []
    for thing in things:
        try:
            results.append(use(thing))
        except UserError as problem:
            problems.append(problem)
    if len(problems) > 1:
        raise type(problems[0])(
            "\n".join([f"{len(problems)} problems", *(f"  {problem}" for problem in problems)])
        )
    if problems:
        raise problems[0]
    return results


@contextmanager
def when_interrupted(sentence: str) -> Iterator[None]:
    """Let Ctrl-C inside the block say what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt(*(interruption.args or (sentence,))) from None


def exit_on_user_error(main: Callable[[], int | None]) -> None:
    """Run a command-line program's `main` and leave with its exit code.

    A user's mistake, and a file that the machine refuses, print one message and exit 2. Ctrl-C prints one sentence and exits 130, that of
    `when_interrupted` where the program knows what is kept. A reader of stdout that left is exit 141.
    """
    _print_any_text()
    try:
        code = main()
        if sys.stdout is not None:  # closed by who started the program (>&-)
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
        name = error.filename
        if name is None and _stdout_is_full(error):
            name = "standard output"
        if error.errno not in REFUSED_BY_THE_MACHINE or name is None:
            raise
        say_once(
            f"error: {name}: {error.strerror}. Free some space or permit it, or choose another place."
        )
        code = UserError.exit_code
    sys.exit(code or 0)


def say_once(message: str) -> None:
    """Print on stderr why this process ends. Of the ranks that torchrun started on a node, one speaks for all with the same message.

    The message goes into torchrun's error file too, so that its own report ends with it instead of a pointer to torch's documentation.
    """
    message = _ESCAPED_BYTE.sub(
        lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", message
    )  # names of files need not be UTF-8
    message = message.encode(errors="backslashreplace").decode()
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt_0/LOCAL_RANK/error.json
    if not error_file:
        _print_on_stderr(message)
        return
    path = Path(error_file)
    claim = (
        path.parent.parent / f"said_{hashlib.blake2b(message.encode(), digest_size=12).hexdigest()}"
    )
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
        first = True
    except FileExistsError:
        first = False
    except OSError:  # better twice than never
        first = True
    if first:
        _print_on_stderr(message)
    # torchrun reports the earliest as the cause: that shall be the rank that spoke.
    record = {
        "message": message if first else "as another rank of this node says",
        "timestamp": int(time.time()) + (not first),
    }
    try:
        path.write_text(json.dumps(record), encoding="utf-8")
    except OSError:
        return  # the message was printed


def _print_on_stderr(message: str) -> None:
    """A terminal that is gone does not change the exit code."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def _print_any_text() -> None:
    """Names of files need not be UTF-8, and a terminal need not know every letter: print an escape instead of failing."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _stdout_is_full(error: OSError) -> bool:
    """Whether it is stdout that takes no more (a full disk, a quota): asked with a line end. Then nothing more is written to it."""
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
    """Whether it is stdout that broke: its reader (`head`, a pager) has seen enough. Then nothing more is written to it."""
    try:
        stdout = sys.stdout.fileno()
    except OSError:  # a stand-in without a file
        return False
    poll = select.poll()
    poll.register(stdout, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True
