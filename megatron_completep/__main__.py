"""All programs of the project under one name: `megatron-completep COMMAND ...`.

    megatron-completep plan configs/completep_1b.yaml --world-size 64
    torchrun --nproc-per-node 8 -m megatron_completep pretrain configs/completep_1b.yaml

A command is a program of tools/, or the trainer. `python -m megatron_completep` is the same.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_completep import __version__
from megatron_completep.command_line import PROGRAM, command_name, did_you_mean
from megatron_completep.errors import UserError, exit_on_user_error
from megatron_completep.launch import begin_program

PACKAGE = Path(__file__).parent


def modules() -> dict[str, str]:
    """The module of each command, within the package; those that users call first come first."""
    tools = sorted(path.stem for path in (PACKAGE / "tools").glob("[a-z]*.py"))
    by_command = {command_name(tool): f"tools.{tool}" for tool in tools}
    first = {"pretrain": "pretrain"}
    for name in ("quickstart", "preprocess", "plan"):
        first[name] = by_command[name]
    return {**first, **by_command}


def usage() -> str:
    """What `--help` prints: every command with the first sentence of its module."""
    lines = [f"usage: {PROGRAM} COMMAND ...", "", "commands:"]
    commands = modules()
    width = max(map(len, commands)) + 2
    for command, module in commands.items():
        # Parsed, not imported: most modules import torch.
        source = PACKAGE / f"{module.replace('.', '/')}.py"
        docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
        first_sentence = " ".join(docstring.split("\n\n")[0].split()).split(". ")[0]
        lines.append(f"  {command:<{width}}{first_sentence.rstrip('.')}")
    lines += ["", f"{PROGRAM} COMMAND --help shows every option and an example."]
    return "\n".join(lines)


def run(words: Sequence[str]) -> int | None:
    """Run the command that the first word names with the others; its exit code.

    Raises UserError for an unknown command.
    """
    command, *arguments = words or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command == "--version":
        print(__version__)
        return 0
    commands = modules()
    if command not in commands:
        raise UserError(
            f"{command}: no such command.{did_you_mean(command, commands)} "
            f"{PROGRAM} --help lists them."
        )
    # What the command's own usage and examples name.
    sys.argv = [f"{PROGRAM} {command}", *arguments]
    if command == "pretrain":
        begin_program()  # before the import, which takes seconds
    code: int | None = importlib.import_module(f"megatron_completep.{commands[command]}").main()
    return code


def main() -> None:
    """The entry point of the installed program."""
    exit_on_user_error(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
