"""The commands that the documentation shows, and what it takes to check them."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never
from unittest import mock

from megatron_completep.command_line import Parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = ("python", "torchrun", "make", "sbatch", "kubectl", "pip", "trackio", "wandb")
# Words that stand for a number, a name or a choice of the reader's.
STAND_INS = {"N": "2", "K": "2", "M": "2", "V": "512", "N/2": "1"}


@dataclass(frozen=True)
class Command:
    page: str
    text: str  # one line, without continuation marks, prompt and comment

    @property
    def words(self) -> list[str]:
        """As a shell would part them; optional parts in brackets are given,
        a letter that stands for a number is one.
        """
        plain = re.sub(r"\[(-[^\]]*|[\w.]+=\w+)(?: \.\.\.)?\]", r"\1", self.text)
        return [
            STAND_INS.get(word, word) for word in shlex.split(plain, comments=True) if word != "..."
        ]


def commands() -> list[Command]:
    """Of fenced blocks without a language or in bash,
    and of `python tools/...` inside a sentence; each once a page.
    """
    found: dict[Command, None] = {}
    for path in PAGES:
        page, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        for language, block in FENCE.findall(text):
            if language in ("", "bash"):
                found.update({Command(page, line): None for line in shell_lines(block)})
        for inline in re.findall(
            r"`((?:python tools/|python -m |make |OMP_NUM_THREADS=1 python )[^`\n]+)`",
            FENCE.sub("", text),
        ):
            found[Command(page, inline)] = None
    return list(found)


def shell_lines(block: str) -> Iterator[str]:
    for line in block.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s{2,}(?=python tools/)", line.strip()):
            part = re.sub(r"\s+#(?!\S*=).*$", "", part.removeprefix("$ "))
            part = re.sub(r"\s{2,}", " ", part)
            if re.sub(r"^(\w+=\S+\s+)+", "", part).split(" ")[0] in PROGRAMS:
                yield part


class Parsed(Exception):
    """The command line was understood."""

    def __init__(self, values: argparse.Namespace):
        self.values = values


def parse(module: str, arguments: list[str]) -> argparse.Namespace:
    """What a program of the project makes of its arguments, without running it.

    SystemExit where it refuses them.
    """
    program = importlib.import_module(module)

    original = Parser.parse_args

    def parse_and_stop(parser: Parser, *given: Any, **named: Any) -> Never:
        raise Parsed(original(parser, *given, **named))

    with mock.patch.object(Parser, "parse_args", parse_and_stop):
        try:
            program.main(arguments)
        except Parsed as done:
            return done.values
    raise AssertionError(f"{module} read no arguments")


def program_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Module and arguments, where a command runs a program of the project."""
    words = (
        [word for word in words if not re.fullmatch(r"\w+=\S*", word)] if "=" in words[0] else words
    )
    for number, word in enumerate(words):
        if re.fullmatch(r"tools/\w+\.py", word):
            return f"megatron_completep.tools.{word[6:-3]}", words[number + 1 :]
        if word == "-m" and words[number + 1].startswith("megatron_completep."):
            return words[number + 1], words[number + 2 :]
    return None
