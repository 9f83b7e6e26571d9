"""The errors a user can cause. Each message says where, which value, which rule, and what to do."""

import os
import select
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

Thing = TypeVar("Thing")
Result = TypeVar("Result")


class UserError(Exception):
    """A mistake in what the user handed in: printed as it is, without a traceback, exit code 2."""

    exit_code = 2


class ConfigError(UserError):
    """The configuration cannot be used; the message lists every problem found."""


class DataError(UserError):
    """A corpus, token file or tokenizer cannot be used; the message names file and field."""


class CheckpointError(UserError):
    """A checkpoint cannot be written or read; the message names file, expected and found value."""


def for_all(things: Iterable[Thing], use: Callable[[Thing], Result]) -> list[Result]:
    """`use` of each thing. The user's mistakes in several of them are raised together, as one error of the first one's kind."""
    results, problems = [], []
    for thing in things:
        try:
            results.append(use(thing))
        except UserError as problem:
            problems.append(problem)
    if len(problems) > 1:
        raise type(problems[0])("\n".join([f"{len(problems)} problems", *(f"  {problem}" for problem in problems)]))
    if problems:
        raise problems[0]
    return results


def exit_on_user_error(main: Callable[[], int | None]) -> None:
    """Run a command-line program's `main` and leave with its exit code; a user's mistake prints one message and exits 2."""
    try:
        code = main()
        sys.stdout.flush()
    except UserError as error:
        with suppress(OSError):  # a terminal that is gone does not change the code
            print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except BrokenPipeError:
        if not _reader_left():
            raise
        code = 128 + 13  # as a shell reports SIGPIPE
    sys.exit(code or 0)


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
