"""How a program of the project reads its command line: overrides anywhere, typed values, all problems at once."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Never, TypeVar

from megatron_completep.errors import UserError, say_once

Value = TypeVar("Value")

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")
_NEGATIVE = re.compile(r"-[\d.]")
_WRONG = (
    object()
)  # stands for a value that was refused, so that the rest of the command line is still read
LARGEST = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """An argument parser for everybody: its description is the tool's docstring, which holds an example.

    With `add_overrides`, words `section.key=value` may stand anywhere, between options and in subcommands too. A value may begin
    with a minus and a digit (`--lr -10:-5:1`). A wrong command line prints every problem that is found and leaves with code 2.
    Options are written in full: an abbreviation would change its meaning when an option is added.
    """

    def __init__(self, description: str | None = None, **settings: Any):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, allow_abbrev=False, **settings)
        self._problems: list[str] = []

    def add_overrides(self, help: str = "settings that replace the file's") -> None:
        """Take words `section.key=value` into `overrides`, in their order, wherever they stand."""
        self.add_argument(
            "overrides",
            nargs="*",
            default=[],
            metavar="section.key=value",
            type=_override,
            help=help,
        )

    def add_subparsers(self, **settings: Any) -> Any:
        """As argparse; the help of a command ends with its lines of the description's examples."""
        return super().add_subparsers(**{"parser_class": self._command, **settings})

    def _command(self, **settings: Any) -> Parser:
        name = settings["prog"].rpartition(" ")[2]
        examples = [
            line for line in (self.description or "").splitlines() if f".py {name} " in line
        ]
        return Parser(
            **{"epilog": "\n".join(["Example:", "", *examples]) if examples else None, **settings}
        )

    def parse_known_args(  # type: ignore[override]  # one signature for typeshed's overloads
        self, args: Any = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse, for subcommands too; what is not understood is a problem here already, so nothing is ever left over."""
        self._problems = []
        words, overrides = self._sort_out(
            sys.argv[1:] if args is None else [str(word) for word in args]
        )
        values, rest = super().parse_known_args(words, namespace)
        self._problems += [self._not_understood(word) for word in rest]
        if self._problems:
            self._refuse()
        if self._takes_overrides:
            values.overrides = overrides + values.overrides
        return values, []

    @property
    def _takes_overrides(self) -> bool:
        return any(action.dest == "overrides" for action in self._actions)

    def error(self, message: str) -> Never:
        """Refuse the command line for this reason, and for those that were found before."""
        self._problems.append(
            re.sub(r"^the following arguments are required: (.*)$", r"missing: \1.", message)
        )
        self._refuse()

    def _refuse(self) -> Never:
        problems = list(dict.fromkeys(self._problems))
        several = [
            f"{len(problems)} problems in this command line",
            *(f"  {problem}" for problem in problems),
        ]
        message = "\n".join(several) if len(problems) > 1 else problems[0]
        say_once(f"error: {message}\n{self.prog} --help shows every option and an example.")
        sys.exit(UserError.exit_code)

    def _sort_out(self, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """(words that argparse reads as they are meant, overrides); unknown options are noted as problems and left out.

        The value of an option is never an override. What follows the name of a subcommand is that one's matter.
        """
        kept: list[str] = []
        overrides: list[str] = []
        remaining = iter(words)
        has_commands = any(
            isinstance(action, argparse._SubParsersAction) for action in self._actions
        )
        for word in remaining:
            is_option = (
                word.startswith("-")
                and word != "-"
                and not _NEGATIVE.match(word)
                and " " not in word
            )
            if has_commands and not is_option:
                return [*kept, word, *remaining], overrides
            if word == "--":
                later = list(remaining)
                lifted = [word for word in later if self._takes_overrides and _OVERRIDE.match(word)]
                positional = [word for word in later if word not in lifted]
                return kept + ([word, *positional] if positional else []), overrides + lifted
            action = self._option_string_actions.get(word)
            if action is not None and action.nargs is None:
                value = next(remaining, None)
                if value is not None and _NEGATIVE.match(value):
                    kept.append(f"{word}={value}")
                else:
                    kept += [word] if value is None else [word, value]
            elif is_option and word.partition("=")[0] not in self._option_string_actions:
                self._problems.append(self._not_understood(word))
            elif self._takes_overrides and _OVERRIDE.match(word):
                overrides.append(word)
            else:
                kept.append(word)
        return kept, overrides

    def _not_understood(self, word: str) -> str:
        if word.startswith("-"):
            return f"{word}: no such option.{did_you_mean(word.partition('=')[0], self._option_string_actions)}"
        if self._takes_overrides:
            return _not_an_override(word)
        return f"{word}: one word too many. Quote a value that holds spaces."

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """A value that its type refuses is noted, and the next word is read."""
        try:
            return super()._get_value(action, arg_string)  # private, the same since Python 2.7
        except argparse.ArgumentError as error:
            is_override = action.dest == "overrides"
            self._problems.append(
                error.message
                if is_override
                else f"{name_of(action)} = {arg_string}: {error.message}"
            )
            return _WRONG

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Choices are listed as they are written, with the nearest one."""
        if value is _WRONG or action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        near = did_you_mean(str(value), choices)
        problem = f"{name_of(action)} = {value}: not known.{near} Use one of: {', '.join(choices)}."
        if isinstance(action, argparse._SubParsersAction):
            self.error(problem)
        self._problems.append(problem)


def name_of(action: argparse.Action) -> str:
    """What the user knows an argument by: its longest option, or its place in the usage."""
    if action.option_strings:
        return max(action.option_strings, key=len)
    return str(action.metavar or action.dest)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?', or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _override(word: str) -> str:
    if not _OVERRIDE.match(word):
        raise argparse.ArgumentTypeError(_not_an_override(word))
    return word


def _not_an_override(word: str) -> str:
    return f"{word}: not an override. Write section.key=value, such as optimizer.base_lr=1e-3."


def whole(at_least: int = 1, at_most: int = LARGEST) -> Callable[[str], int]:
    """A whole number from `at_least` to `at_most`."""
    rule = f"give a whole number from {at_least} to {at_most}."

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(rule) from None
        if not at_least <= value <= at_most:
            raise argparse.ArgumentTypeError(rule)
        return value

    return convert


def real(
    at_least: float = -math.inf, at_most: float = math.inf, above: float | None = None
) -> Callable[[str], float]:
    """A finite number within bounds; `above` is a bound that is not taken itself."""
    bounds = (
        [f"above {above:g}"]
        if above is not None
        else [f"of at least {at_least:g}"]
        if at_least > -math.inf
        else []
    )
    bounds += [f"of at most {at_most:g}"] if at_most < math.inf else []
    rule = f"give a finite number {' and '.join(bounds)}".rstrip() + "."

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(rule) from None
        if not (math.isfinite(value) and at_least <= value <= at_most) or (
            above is not None and value <= above
        ):
            raise argparse.ArgumentTypeError(rule)
        return value

    return convert


def list_of(item: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """Values with commas between them, at least one; a comma may end them. What is wrong with each is said."""

    def convert(text: str) -> list[Value]:
        parts = [part.strip() for part in text.strip().removesuffix(",").split(",")]
        if not all(parts):
            raise argparse.ArgumentTypeError(
                "a value is missing. Put one comma between two values."
            )
        values: list[Value] = []
        problems: dict[str, list[str]] = {}
        for part in parts:
            try:
                values.append(item(part))
            except argparse.ArgumentTypeError as error:
                problems.setdefault(str(error), []).append(part)
        if problems:
            raise argparse.ArgumentTypeError(
                "; ".join(f"{', '.join(wrong)}: {rule}" for rule, wrong in problems.items())
            )
        return values

    return convert


def one_of(choices: Iterable[str]) -> Callable[[str], str]:
    """One of these words; for lists, where argparse's own `choices` would compare the whole list."""
    known = list(choices)

    def convert(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(
                f"not known.{did_you_mean(text, known)} Use some of: {', '.join(known)}."
            )
        return text

    return convert


def file_to_read(text: str) -> Path:
    """A regular file. One that does not exist is left to the reader of the file, whose message says what it is for."""
    return _path(text, files=True, folders=False)


def folder_to_read(text: str) -> Path:
    """A folder, or nothing yet."""
    return _path(text, files=False, folders=True)


def file_or_folder(text: str) -> Path:
    """A regular file, a folder, or nothing yet."""
    return _path(text, files=True, folders=True)


def tokenizer_model(text: str) -> str:
    """A tokenizer's file or folder, or the name of an encoding."""
    _path(text, files=True, folders=True)
    return text


def token_files(text: str) -> str:
    """PREFIX of PREFIX.bin, PREFIX.idx and PREFIX.json."""
    for name in names_of_token_files(text):
        _path(str(name), files=True, folders=False, show=str(name))
    return text


def names_of_token_files(prefix: str | Path) -> list[Path]:
    """The three files that belong to a prefix."""
    return [Path(f"{prefix}.{suffix}") for suffix in ("bin", "idx", "json")]


def _path(text: str, files: bool, folders: bool, show: str = "") -> Path:
    """Refuses what would block or give its bytes only once: pipes, devices, sockets."""
    wanted = " or ".join(
        kind for kind, asked in (("a file", files), ("a folder", folders)) if asked
    )
    subject = f"{show} " if show else ""
    try:
        mode = os.stat(text).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return Path(text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise argparse.ArgumentTypeError(
            f"{subject}cannot be read: {reason}. Give {wanted}."
        ) from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise argparse.ArgumentTypeError(
            f"{subject}is no regular file (a pipe or a device). Save its content, and give {wanted}."
        )
    if (stat.S_ISREG(mode) and not files) or (stat.S_ISDIR(mode) and not folders):
        raise argparse.ArgumentTypeError(
            f"{subject}is {'a folder' if stat.S_ISDIR(mode) else 'a file'}. Give {wanted}."
        )
    if not os.access(text, os.R_OK):
        raise argparse.ArgumentTypeError(
            f"{subject}cannot be read: you have no permission to. Give {wanted} that you can read."
        )
    return Path(text)
