"""How a program of the project reads its command line.

Overrides may stand anywhere, values have types, and all problems are reported at once.
"""

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

PROGRAM = "megatron-completep"  # the installed program, whose commands are those of tools/
# Commands whose names are not those of their files, with dashes.
_SHORT_NAMES = {
    "show_plan": "plan",
    "preprocess_data": "preprocess",
    "evaluate_model": "evaluate",
    "export_hf": "export",
    "import_hf": "import",
}
_TOOL = re.compile(r"python tools/(\w+)\.py")
_TRAINER = re.compile(r"python -m megatron_completep\.pretrain")

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")
_NEGATIVE = re.compile(r"-[\d.]")
_MISSING = re.compile(r"^the following arguments are required: (.*)$")
# Stands for a value that was refused, so that argparse goes on to read the remaining words.
_REFUSED = object()
LARGEST = 2**31 - 1

_Subcommands = argparse._SubParsersAction  # private, and the only way to know such an argument


class Parser(argparse.ArgumentParser):
    """An argument parser for everybody: its description is the tool's docstring, with an example.

    With `add_overrides`, words `section.key=value` may stand anywhere, between options and in
    subcommands too. A value may begin with a minus and a digit (`--lr -10:-5:1`). A wrong command
    line prints every problem that is found and exits with code 2. Options are written in full: an
    abbreviation would change its meaning when an option is added.
    """

    def __init__(self, description: str | None = None, **settings: Any):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        settings["epilog"] = as_called(settings.get("epilog") or "")
        description = as_called(description or "")
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
        # The description's examples stand one a line; this command's help shows those that call it.
        name = settings["prog"].rpartition(" ")[2]
        lines = (self.description or "").splitlines()
        calls = re.compile(rf"(\.py|{PROGRAM} \S+) {re.escape(name)} ")
        examples = [line for line in lines if calls.search(line)]
        epilog = "\n".join(["Example:", "", *examples]) if examples else None
        return Parser(**{"epilog": epilog, **settings})

    def parse_known_args(  # type: ignore[override]  # one signature for typeshed's overloads
        self, args: Any = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse, for subcommands too.

        What is not understood counts as a problem here already, so no word is ever left over.
        """
        self._problems = []
        arguments = sys.argv[1:] if args is None else [str(word) for word in args]
        words, overrides = self._separate_overrides(arguments)
        namespace, unknown_words = super().parse_known_args(words, namespace)
        self._problems += [self._not_understood(word) for word in unknown_words]
        if self._problems:
            self._refuse()
        if self._takes_overrides:
            namespace.overrides = overrides + namespace.overrides
        return namespace, []

    @property
    def _takes_overrides(self) -> bool:
        return any(action.dest == "overrides" for action in self._actions)

    def error(self, message: str) -> Never:
        """Refuse the command line for this reason, and for those that were found before."""
        # argparse stops at its first problem, so this is the last one that can be found.
        self._problems.append(_MISSING.sub(r"missing: \1.", message))
        self._refuse()

    def _refuse(self) -> Never:
        # Several values of one option may break the same rule.
        problems = list(dict.fromkeys(self._problems))
        message = problems[0]
        if len(problems) > 1:
            headline = f"{len(problems)} problems in this command line"
            message = "\n".join([headline, *(f"  {problem}" for problem in problems)])
        say_once(f"error: {message}\n{self.prog} --help shows every option and an example.")
        sys.exit(UserError.exit_code)

    def _separate_overrides(self, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """(words that argparse understands as they are meant, overrides).

        Unknown options are noted as problems and left out. The value of an option is never an
        override. The parser of a subcommand reads what follows the subcommand's name.
        """
        argparse_words: list[str] = []
        overrides: list[str] = []
        remaining = iter(words)
        has_commands = any(isinstance(action, _Subcommands) for action in self._actions)
        for word in remaining:
            is_option = _looks_like_option(word)
            if has_commands and not is_option:
                return [*argparse_words, word, *remaining], overrides
            # After "--" every word is positional, so argparse would take an override for a value.
            if word == "--":
                later_overrides, positional = self._after_dashes(list(remaining))
                argparse_words += [word, *positional] if positional else []
                return argparse_words, overrides + later_overrides

            action = self._option_string_actions.get(word)
            if action is not None and action.nargs is None:
                argparse_words += _option_with_value(word, next(remaining, None))
            elif is_option and word.partition("=")[0] not in self._option_string_actions:
                self._problems.append(self._not_understood(word))
            elif self._takes_overrides and _OVERRIDE.match(word):
                overrides.append(word)
            else:
                argparse_words.append(word)
        return argparse_words, overrides

    def _after_dashes(self, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """(overrides, positional words) of what stands after `--`."""
        overrides: list[str] = []
        positional: list[str] = []
        for word in words:
            is_override = self._takes_overrides and _OVERRIDE.match(word)
            (overrides if is_override else positional).append(word)
        return overrides, positional

    def _not_understood(self, word: str) -> str:
        if word.startswith("-"):
            suggestion = did_you_mean(word.partition("=")[0], self._option_string_actions)
            return f"{word}: no such option.{suggestion}"
        if self._takes_overrides:
            return _not_an_override(word)
        return f"{word}: one word too many. Quote a value that holds spaces."

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """A value that its type refuses is noted as a problem, and the next word is read."""
        try:
            return super()._get_value(action, arg_string)  # private, the same since Python 2.7
        except argparse.ArgumentError as error:
            # The message about an override names it already.
            where = "" if action.dest == "overrides" else f"{name_of(action)} = {arg_string}: "
            self._problems.append(f"{where}{error.message}")
            return _REFUSED

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Choices are listed as they are written, with the nearest one."""
        if value is _REFUSED or action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        near = did_you_mean(str(value), choices)
        problem = f"{name_of(action)} = {value}: not known.{near} Use one of: {', '.join(choices)}."
        # Without a command there is no parser for the words that follow: nothing more can be read.
        if isinstance(action, _Subcommands):
            self.error(problem)
        self._problems.append(problem)


def command_name(tool: str) -> str:
    """The command of the installed program that runs tools/TOOL.py."""
    return _SHORT_NAMES.get(tool, tool.replace("_", "-"))


def call_of(tool: str) -> list[str]:
    """The words that call a tool, in the way in which this process was called."""
    return as_called(f"python tools/{tool}.py").split()


def as_called(text: str) -> str:
    """A text whose commands are those of the installed program, if this process is one of them.

    Otherwise they stay `python tools/NAME.py`, as in a checkout.
    """
    if not Path(sys.argv[0]).name.startswith(PROGRAM):
        return text
    text = _TOOL.sub(lambda call: f"{PROGRAM} {command_name(call[1])}", text)
    return _TRAINER.sub(f"{PROGRAM} pretrain", text)


def _looks_like_option(word: str) -> bool:
    """Whether a word is an option, known or not: no negative number, `-` or text with spaces."""
    if not word.startswith("-") or word == "-" or " " in word:
        return False
    return not _NEGATIVE.match(word)


def _option_with_value(option: str, value: str | None) -> list[str]:
    """An option and the word after it, so that argparse takes the word for the option's value."""
    if value is None:
        return [option]
    # argparse takes a separate word such as -10:-5:1 for an unknown option.
    return [f"{option}={value}"] if _NEGATIVE.match(value) else [option, value]


def name_of(action: argparse.Action) -> str:
    """What the user knows an argument by: its longest option, or its place in the usage."""
    if action.option_strings:
        return max(action.option_strings, key=len)
    return str(action.metavar or action.dest)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?', or nothing where no known word is close."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _override(word: str) -> str:
    if not _OVERRIDE.match(word):
        raise argparse.ArgumentTypeError(_not_an_override(word))
    return word


def _not_an_override(word: str) -> str:
    return f"{word}: not an override. Write section.key=value, such as optimizer.base_lr=1e-3."


def whole(at_least: int = 1, at_most: int = LARGEST) -> Callable[[str], int]:
    """The type of a whole number from `at_least` to `at_most`."""
    rule = f"give a whole number from {at_least} to {at_most}."

    def convert(word: str) -> int:
        try:
            number = int(word)
        except ValueError:
            raise argparse.ArgumentTypeError(rule) from None
        if not at_least <= number <= at_most:
            raise argparse.ArgumentTypeError(rule)
        return number

    return convert


def real(
    at_least: float = -math.inf, at_most: float = math.inf, above: float | None = None
) -> Callable[[str], float]:
    """The type of a finite number within bounds; `above` is a bound that is not allowed itself."""
    bounds = []
    if above is not None:
        bounds.append(f"above {above:g}")
    elif at_least > -math.inf:
        bounds.append(f"of at least {at_least:g}")
    if at_most < math.inf:
        bounds.append(f"of at most {at_most:g}")
    rule = f"give a finite number {' and '.join(bounds)}".rstrip() + "."

    def convert(word: str) -> float:
        try:
            number = float(word)
        except ValueError:
            raise argparse.ArgumentTypeError(rule) from None
        # Not a number compares as false with every bound; infinity may be within open ones.
        is_within = math.isfinite(number) and at_least <= number <= at_most
        is_above = above is None or number > above
        if not (is_within and is_above):
            raise argparse.ArgumentTypeError(rule)
        return number

    return convert


def list_of(item: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """The type of a list of at least one `item`, with commas between; a comma may end it.

    A refusal names every item that is wrong.
    """

    def convert(text: str) -> list[Value]:
        words = [word.strip() for word in text.strip().removesuffix(",").split(",")]
        if not all(words):
            raise argparse.ArgumentTypeError(
                "a value is missing. Put one comma between two values."
            )
        items: list[Value] = []
        wrong_words: dict[str, list[str]] = {}  # by the rule that they break
        for word in words:
            try:
                items.append(item(word))
            except argparse.ArgumentTypeError as error:
                wrong_words.setdefault(str(error), []).append(word)
        if wrong_words:
            problems = [f"{', '.join(wrong)}: {rule}" for rule, wrong in wrong_words.items()]
            raise argparse.ArgumentTypeError("; ".join(problems))
        return items

    return convert


def one_of(choices: Iterable[str]) -> Callable[[str], str]:
    """The type of one of these words.

    It is for the items of a list: argparse's own `choices` would compare the whole list.
    """
    allowed = list(choices)

    def convert(word: str) -> str:
        if word not in allowed:
            raise argparse.ArgumentTypeError(
                f"not known.{did_you_mean(word, allowed)} Use some of: {', '.join(allowed)}."
            )
        return word

    return convert


def file_to_read(text: str) -> Path:
    """The type of a regular file.

    One that does not exist is left to the reader of the file, whose message says what it is for.
    """
    return _path(text, files=True, folders=False)


def folder_to_read(text: str) -> Path:
    """The type of a folder that exists, or does not exist yet."""
    return _path(text, files=False, folders=True)


def file_or_folder(text: str) -> Path:
    """The type of a regular file or a folder that exists, or does not exist yet."""
    return _path(text, files=True, folders=True)


def tokenizer_model(text: str) -> str:
    """The type of a tokenizer's file or folder, or the name of an encoding."""
    _path(text, files=True, folders=True)
    return text


def token_files(text: str) -> str:
    """The type of the PREFIX of PREFIX.bin, PREFIX.idx and PREFIX.json."""
    for path in names_of_token_files(text):
        _path(str(path), files=True, folders=False, show=str(path))
    return text


def names_of_token_files(prefix: str | Path) -> list[Path]:
    """The three files that belong to a prefix."""
    return [Path(f"{prefix}.{suffix}") for suffix in ("bin", "idx", "json")]


def _path(text: str, files: bool, folders: bool, show: str = "") -> Path:
    """A path, which may not exist. Refuses pipes, devices and sockets, and the kind not asked for.

    files, folders: whether the kind is asked for. show: the path as messages name it, where the
    argument itself is another text.
    """
    kinds = (["a file"] if files else []) + (["a folder"] if folders else [])
    kind = " or ".join(kinds)
    subject = f"{show} " if show else ""
    try:
        mode = os.stat(text).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return Path(text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise argparse.ArgumentTypeError(
            f"{subject}cannot be read: {reason}. Give {kind}."
        ) from None

    # To open a pipe would wait for its writer, and it gives its content only once.
    is_file = stat.S_ISREG(mode)
    is_folder = stat.S_ISDIR(mode)
    if not (is_file or is_folder):
        raise argparse.ArgumentTypeError(
            f"{subject}is no regular file (a pipe or a device). Save its content, and give {kind}."
        )
    if (is_file and not files) or (is_folder and not folders):
        present_kind = "a folder" if is_folder else "a file"
        raise argparse.ArgumentTypeError(f"{subject}is {present_kind}. Give {kind}.")
    if not os.access(text, os.R_OK):
        raise argparse.ArgumentTypeError(
            f"{subject}cannot be read: you have no permission to. Give {kind} that you can read."
        )
    return Path(text)
