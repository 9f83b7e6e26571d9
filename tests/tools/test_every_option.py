"""Every option of every program, by the parts of its command line."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Never
from unittest import mock

import pytest

from megatron_completep.command_line import (
    Parser,
    file_or_folder,
    file_to_read,
    folder_to_read,
    token_files,
    tokenizer_model,
)
from tests.tools.usages import TOOLS, USAGES


def parsers_of(tool: str) -> Iterator[tuple[list[str], Parser]]:
    """(words before its own, parser) of a tool and of each of its commands."""

    class Built(Exception):
        pass

    def give(parser: Parser, *_: object) -> Never:
        raise Built(parser)

    with mock.patch.object(Parser, "parse_args", give), pytest.raises(Built) as built:
        importlib.import_module(f"megatron_completep.{tool}").main([])
    parser = built.value.args[0]
    commands = [
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    ]
    if not commands:
        yield [], parser
    for action in commands:
        yield from (([name], command) for name, command in action.choices.items())


def refused(parser: Parser, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which a command line is refused."""
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(words)
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (2, "")
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    assert "--help" in captured.err
    return captured.err


def given(parser: Parser, action: argparse.Action, value: str) -> list[str]:
    """The words that hand this value to an option, or to a positional argument among the others."""
    if action.option_strings:
        return [f"{action.option_strings[-1]}={value}"]
    return [
        value if other is action else "x"
        for other in parser._actions
        if not other.option_strings and other.dest != "overrides"
    ]


def kind(action: argparse.Action) -> str:
    return getattr(action.type, "__qualname__", "").partition(".")[0]


@pytest.mark.parametrize("tool", TOOLS)
def test_help_shows_an_example_and_an_unknown_option_is_named(
    tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, parser in parsers_of(tool):
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"megatron_completep.{tool}").main(
                ["--help"] if not command else [*command, "--help"]
            )
        shown = capsys.readouterr().out
        assert ended.value.code == 0 and "usage:" in shown
        assert not command or ("Example:" in shown and f".py {command[0]} " in shown)
        assert "--no-such-option=3: no such option" in refused(
            parser, ["--no-such-option=3"], capsys
        )
        known = next(
            (
                action.option_strings[-1]
                for action in parser._actions
                if len(action.option_strings[-1:] or [""][0]) > 5
            ),
            None,
        )
        if known:
            assert f"Did you mean {known}?" in refused(parser, [f"{known}z"], capsys)
    with pytest.raises(SystemExit):
        importlib.import_module(f"megatron_completep.{tool}").main(["--help"])
    shown = capsys.readouterr().out
    assert "Example" in shown
    assert "python tools/" in shown or "python -m megatron_completep.pretrain" in shown


@pytest.mark.parametrize("tool", TOOLS)
def test_every_number_has_bounds_and_a_wrong_one_is_named_with_its_rule(
    tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for _, parser in parsers_of(tool):
        for action in parser._actions:
            assert action.type not in (int, float), action.dest
            if kind(action) not in ("whole", "real", "list_of", "rates"):
                continue
            for value in ("nan", "inf", "-inf", "x", "1e999", "", "1,,2", "0x10", "9" * 5000):
                message = refused(parser, given(parser, action, value), capsys)
                assert f"{action.option_strings[-1]} = {value}: " in message
                assert "give " in message or "Put " in message or "not known" in message


@pytest.mark.parametrize("tool", TOOLS)
def test_a_choice_that_is_none_is_answered_with_all_of_them(
    tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for _, parser in parsers_of(tool):
        for action in parser._actions:
            if action.choices is not None:
                message = refused(parser, given(parser, action, "nothing_of_that_sort"), capsys)
                assert "= nothing_of_that_sort: not known." in message
                assert all(str(choice) in message for choice in action.choices)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_path_of_the_wrong_kind_is_refused_by_name(
    tool: str, place: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for _, parser in parsers_of(tool):
        for action in parser._actions:
            wrong = {"pipe": "is no regular file", "loop": "cannot be read"}
            if action.type is file_to_read:
                wrong["folder"] = "is a folder. Give a file."
            elif action.type is folder_to_read:
                wrong["text"] = "is a file. Give a folder."
            elif action.type not in (file_or_folder, tokenizer_model):
                continue
            for name, words in wrong.items():
                message = refused(parser, given(parser, action, str(place[name])), capsys)
                assert f"= {place[name]}: {words}" in message


def test_token_files_are_never_read_from_a_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "corpus.idx")
    seen = 0
    for tool in TOOLS:
        for _, parser in parsers_of(tool):
            for action in parser._actions:
                if action.type is token_files:
                    assert f"{tmp_path}/corpus.idx is no regular file" in refused(
                        parser, given(parser, action, f"{tmp_path}/corpus"), capsys
                    )
                    seen += 1
    assert seen >= 5


@pytest.mark.parametrize("tool", TOOLS)
def test_overrides_stand_anywhere_and_one_without_a_value_is_named(
    tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, parser in parsers_of(tool):
        if not parser._takes_overrides:
            continue
        (usage,) = [
            u for u in USAGES if u.tool == tool and u.words.split()[: len(command)] == command
        ] or [None]
        if usage is None:
            continue
        words = [
            word.strip("{}")
            for word in usage.words.split()[len(command) :]
            if "training.output_dir" not in word
        ]
        assert "model.num_layers: not an override" in refused(
            parser, [*words, "model.num_layers"], capsys
        )
        wanted = ["model.num_layers=2", "data.train=[{prefix: a}]"]
        plain = vars(parser.parse_args([*words, *wanted]))
        assert plain["overrides"] == wanted
        values_follow = {
            number + 1
            for number, word in enumerate(words)
            if word.startswith("--") and word != "--dry-run"
        }
        for place in set(range(len(words) + 1)) - values_follow:
            assert (
                vars(parser.parse_args([wanted[0], *words[:place], wanted[1], *words[place:]]))
                == plain
            )
