"""Every program through the same mistakes, in process: one message that names what was given, the
right exit code, no traceback.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Never
from unittest import mock

import pytest
import torch
import triton

from megatron_completep.command_line import (
    Parser,
    file_or_folder,
    file_to_read,
    folder_to_read,
    token_files,
    tokenizer_model,
)
from megatron_completep.config import save_config
from megatron_completep.data.files import printable
from megatron_completep.errors import INTERRUPTED
from tests.support.commands import Programs
from tests.support.configs import SMALLEST, merged, small_config
from tests.support.corpora import write_documents

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ["pretrain", *sorted(f"tools.{path.stem}" for path in (ROOT / "tools").glob("[a-z]*.py"))]


@dataclass(frozen=True)
class Usage:
    """A right command line: `words` over the names of `place`, and the function that begins the
    work, at which a test breaks in.
    """

    tool: str
    words: str
    work: str
    output: str = ""  # of `words`, what is written: "file" or "folder" ({out}); "" where nothing is

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"megatron_completep.{self.tool}")


USAGES = [
    Usage("pretrain", "{config}", "pretrain"),
    Usage("tools.benchmark_checkpoint", "--folder {out}", "benchmark_checkpoints", "folder"),
    Usage("tools.benchmark_data", "reading --folder {out}", "benchmark_reading", "folder"),
    Usage("tools.benchmark_data", "preprocessing", "benchmark_preprocessing"),
    Usage("tools.benchmark_kernels", "--device cpu --out {out}", "run", "folder"),
    Usage("tools.benchmark_parallel", "", "compare_parallel"),
    Usage("tools.benchmark_telemetry", "{config}", "measure"),
    Usage("tools.benchmark_training", "--device cpu", "compare"),
    Usage("tools.checkpoint", "list {folder}", "list_checkpoints"),
    Usage("tools.checkpoint", "verify {folder}", "checkpoint_at"),
    Usage("tools.checkpoint", "reshard {folder} --output {out}", "checkpoint_at", "folder"),
    Usage(
        "tools.checkpoint",
        "adapt {folder} {config} training.output_dir={out}",
        "checkpoint_at",
        "folder",
    ),
    Usage(
        "tools.compile_kernels", "{config} --arch sm_90 --cache-dir {out}", "compile_run", "folder"
    ),
    Usage("tools.config_reference", "", "configuration_reference"),
    Usage(
        "tools.coordinate_check",
        "{config} --depths 1,2 --out {out}",
        "coordinate_check.collect",
        "folder",
    ),
    Usage("tools.dataset", "inspect {prefix}", "describe_files"),
    Usage("tools.dataset", "merge --input {prefix} --output-prefix {out}", "merge", "file"),
    Usage("tools.dataset", "split {prefix} --shares 1 --output-prefix {out}", "split", "file"),
    Usage("tools.dataset", "sample {config} --step 1", "describe_step"),
    Usage("tools.draw_step", "--config {config} --output {out}.png", "schedule_actions", "file"),
    Usage("tools.evaluate_model", "{folder} --token-file {prefix} --device cpu", "run_config"),
    Usage("tools.export_hf", "{folder} {out}", "export_model", "folder"),
    Usage("tools.generate", "{folder} --device cpu", "run_config"),
    Usage("tools.gpu_report", "", "describe_device"),
    Usage("tools.import_hf", "{folder} {out}", "import_model", "folder"),
    Usage("tools.laziness", "{config} --out {out}", "laziness.collect", "folder"),
    Usage(
        "tools.lr_transfer",
        "sweep {config} --out {out} --lr -8:-7:1 --workers 1",
        "sweep.run_local",
        "folder",
    ),
    Usage("tools.lr_transfer", "report {folder}", "make_report"),
    Usage("tools.lr_transfer", "plan {folder} {config} --to {out}", "make_plan", "file"),
    Usage(
        "tools.preprocess_data",
        "--input {text} --output-prefix {out} --tokenizer-type bytes",
        "preprocess",
        "file",
    ),
    Usage("tools.quickstart", "--config {config}", "Quickstart.run"),
    Usage("tools.replay_trace", "{text}", "Trace.load"),
    Usage("tools.report", "{folder} --out {out}.html", "read_runs", "file"),
    Usage("tools.show_plan", "{config}", "describe"),
    Usage(
        "tools.train_tokenizer",
        "--input {text} --output {out} --vocab-size 300",
        "train_tokenizer",
        "file",
    ),
    Usage("tools.tune_kernels", "--dry-run", "tune"),
]


def usage_name(usage: Usage) -> str:
    return f"{usage.tool} {usage.words}"


def only(wanted: Callable[[Usage], object]) -> Any:
    """Parametrizes a test over the usages for which `wanted` holds."""
    return pytest.mark.parametrize(
        "usage", [usage for usage in USAGES if wanted(usage)], ids=usage_name
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the command lines read, by name, and things that are not what they should be."""
    folder = tmp_path_factory.mktemp("place")
    write_documents(folder / "corpus", [[range(200)]])
    own = {
        "data": {"train": [{"prefix": str(folder / "corpus")}], "prefetch": 0},
        "training": {
            "global_batch_size": 2,
            "train_steps": 2,
            "output_dir": str(folder / "run"),
        },
    }
    save_config(small_config(**merged(SMALLEST, own)), folder / "config.yaml")
    (folder / "folder").mkdir()
    (folder / "text.txt").write_text("some text")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    names = {"config": "config.yaml", "prefix": "corpus", "text": "text.txt"}
    return {
        name: folder / names.get(name, name)
        for name in ("config", "prefix", "text", "folder", "pipe", "loop")
    }


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, programs: Programs) -> Callable[..., tuple[int, str]]:
    """(usage, words) -> exit code and what was printed.

    Ends the test where a traceback would have been seen.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(triton.knobs.cache, "dir", triton.knobs.cache.dir)

    def run(usage: Usage, words: list[str]) -> tuple[int, str]:
        ended = programs.run(usage.module.main, *words)
        return ended.code, ended.out + ended.err

    return run


def fill(usage: Usage, place: dict[str, Path], out: object, **instead: object) -> list[str]:
    """The words of a usage; a name in `instead` stands for another file."""
    values = {**place, "out": out, **instead}
    return [word.format(**values) for word in usage.words.split()]


def break_in(usage: Usage, error: type[BaseException]) -> Any:
    """Raise `error` where the work begins."""
    *owners, name = usage.work.split(".")
    target: Any = usage.module
    for owner in owners:
        target = getattr(target, owner)
    return mock.patch.object(target, name, mock.Mock(side_effect=error))


# --- the parts of a command line, for every option of every tool ---


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


# --- whole command lines ---


def test_every_tool_has_a_right_command_line_in_the_table() -> None:
    assert {usage.tool for usage in USAGES} == set(TOOLS)


@pytest.mark.parametrize("usage", USAGES, ids=usage_name)
def test_ctrl_c_in_the_middle_is_one_sentence(
    usage: Usage, place: dict[str, Path], tmp_path: Path, call: Any
) -> None:
    with break_in(usage, KeyboardInterrupt):
        code, text = call(usage, fill(usage, place, tmp_path / "out"))
    sentences = [line for line in text.splitlines() if line.startswith("interrupted")]
    assert (code, len(sentences)) == (INTERRUPTED, 1)
    if usage.work in ("sweep.run_local", "preprocess", "Quickstart.run"):
        assert "kept" in sentences[0] and "command" in sentences[0]


@only(
    lambda usage: any(
        name in usage.words for name in ("{config}", "{folder}", "{prefix}", "{text}")
    )
)
def test_a_file_that_does_not_exist_is_named(
    usage: Usage, place: dict[str, Path], tmp_path: Path, call: Any
) -> None:
    for name in ("config", "folder", "prefix", "text"):
        if f"{{{name}}}" in usage.words and (usage.tool, name) != (
            "tools.evaluate_model",
            "prefix",
        ):  # reads the checkpoint first
            code, text = call(
                usage, fill(usage, place, tmp_path / "out", **{name: tmp_path / "nowhere"})
            )
            assert (code, "Traceback" in text) == (2, False) and str(tmp_path / "nowhere") in text


@only(lambda usage: "{config}" in usage.words)
def test_an_override_of_a_setting_that_does_not_exist_is_named(
    usage: Usage, place: dict[str, Path], tmp_path: Path, call: Any
) -> None:
    with break_in(usage, AssertionError):
        if usage.tool in (
            "tools.draw_step",
            "tools.quickstart",
        ):  # the first takes none; the second reads its file as it goes
            return
        code, text = call(usage, [*fill(usage, place, tmp_path / "out"), "model.num_leyers=2"])
    assert code == 2 and "num_leyers" in text and "Did you mean num_layers?" in text


@only(lambda usage: any(name in usage.words for name in ("{config}", "{prefix}", "{text}")))
def test_a_name_that_is_not_utf_8_is_read(
    usage: Usage, place: dict[str, Path], tmp_path: Path, call: Any
) -> None:
    odd = os.fsdecode(b"caf\xe9")
    for path in place["config"].parent.glob("c*.*"):
        (tmp_path / f"{odd}{path.suffix}").write_bytes(path.read_bytes())
    instead = {
        "config": tmp_path / f"{odd}.yaml",
        "prefix": tmp_path / odd,
        "text": tmp_path / f"{odd}.json",
    }
    with break_in(usage, KeyboardInterrupt):
        code, _ = call(usage, fill(usage, place, tmp_path / "out", **instead))
    assert code == INTERRUPTED


@only(lambda usage: usage.output)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    usage: Usage, place: dict[str, Path], tmp_path: Path, call: Any
) -> None:
    endings = [".png", ".html", ".bin", ".json", "_text_document.idx", ""]
    (tmp_path / "file").write_text("")
    for ending in endings:
        os.mkfifo(tmp_path / f"pipe{ending}")
        (tmp_path / f"other_kind{ending}").mkdir() if usage.output == "file" else (
            tmp_path / f"other_kind{ending}"
        ).write_text("")
    for out, words in (
        (tmp_path / "file/out", "is no folder"),
        (tmp_path / "pipe", "is no regular file"),
        (tmp_path / "other_kind", "is a folder" if usage.output == "file" else "is a file"),
        (tmp_path / os.fsdecode(b"caf\xe9"), "not UTF-8"),
    ):
        if "training.output_dir" in usage.words and out.name in ("pipe", "other_kind"):
            words = "is no folder"  # the output is a folder inside it
        elif "training.output_dir" in usage.words and words == "not UTF-8":
            words = "not allowed"  # YAML holds no such text
        with break_in(usage, AssertionError):
            code, text = call(usage, fill(usage, place, out))
        assert code == 2
        assert words in text
        assert str(out) in text or printable(out) in text or ascii(str(out))[1:-1] in text


# What would be lost: the words, and the file that must be as it was.
REPLACED = [
    ("tools.dataset", "merge --input {prefix} --output-prefix {prefix}", "an input"),
    ("tools.dataset", "merge --input {prefix} --output-prefix {link}", "an input"),
    ("tools.dataset", "split {prefix} --shares 50,50 --output-prefix {new} {new}", "named twice"),
    ("tools.dataset", "split {prefix} --shares 50,50 --output-prefix {new} {prefix}", "an input"),
    ("tools.lr_transfer", "plan {folder} {config} --to {config}", "an input"),
    ("tools.lr_transfer", "plan {folder} {config} --to {link}.yaml", "an input"),
    ("tools.lr_transfer", "plan {folder} {config} --to {folder}/proxy.yaml", "an input"),
    ("tools.draw_step", "--config {config}.png --output {config}.png", "an input"),
    ("tools.train_tokenizer", "--input {text} --output {text} --vocab-size 300", "an input"),
    (
        "tools.preprocess_data",
        "--input {prefix}_text_document.json --output-prefix {prefix} --tokenizer-type bytes",
        "an input",
    ),
    ("tools.report", "{folder} --out {folder}/metrics.jsonl", "an input"),
    ("tools.report", "{folder} --out {folder}/config.yaml", "an input"),
    ("tools.import_hf", "{folder} {folder}", "an input"),
    ("tools.report", "{folder} --out {text}", "exists"),
    ("tools.draw_step", "--config {config} --output {config}.png", "exists"),
    ("tools.train_tokenizer", "--input {text} --output {other} --vocab-size 300", "exists"),
    ("tools.train_tokenizer", "--input {text} --output {report} --vocab-size 300", "exists"),
    ("tools.lr_transfer", "plan {folder} {config} --to {text}", "exists"),
    ("tools.dataset", "merge --input {prefix} --output-prefix {other}", "exists"),
    ("tools.dataset", "split {prefix} --shares 1 --output-prefix {other}", "exists"),
]


@pytest.mark.parametrize(
    ("tool", "words", "message"), REPLACED, ids=[f"{tool} {words}" for tool, words, _ in REPLACED]
)
def test_no_input_and_nothing_else_is_replaced_unasked(
    tool: str, words: str, message: str, place: dict[str, Path], tmp_path: Path, call: Any
) -> None:
    for path in (place["config"], place["text"], *place["prefix"].parent.glob("corpus.*")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / f"link{path.suffix}").symlink_to(path.name)
    for name in ("config.png", "corpus_text_document.json", "other", "other.bin", "report.json"):
        (tmp_path / name).write_bytes(place["config"].read_bytes())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    for name in ("config.yaml", "proxy.yaml"):
        (tmp_path / "folder" / name).write_bytes(place["config"].read_bytes())
    names = {name: tmp_path / place[name].name for name in ("config", "prefix", "text", "folder")}
    names |= {
        "link": tmp_path / "link",
        "new": tmp_path / "new",
        "other": tmp_path / "other",
        "report": tmp_path / "report",
    }
    if "config.png" in words or words.endswith("{config}.png"):
        names["config"] = tmp_path / "config"
        (tmp_path / "config").write_bytes(place["config"].read_bytes())
    writing = [usage for usage in USAGES if usage.tool == tool and usage.output]
    usage = next(
        (usage for usage in writing if usage.words.split()[0] == words.split()[0]), writing[0]
    )
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with break_in(usage, AssertionError):
        code, text = call(usage, [word.format(**names) for word in words.split()])
    assert code == 2 and message in text and str(tmp_path) in text
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    if message == "exists":  # the remedy works
        assert "--overwrite" in text
        with break_in(usage, KeyboardInterrupt):
            assert (
                call(usage, [*(word.format(**names) for word in words.split()), "--overwrite"])[0]
                == INTERRUPTED
            )
    elif tool not in (
        "tools.preprocess_data",
        "tools.import_hf",
    ):  # --overwrite loses no input either
        with break_in(usage, AssertionError):
            assert (
                call(usage, [*(word.format(**names) for word in words.split()), "--overwrite"])[0]
                == 2
            )


# Numbers that ran into a traceback, into nothing at all, or for ever.
NUMBERS = [
    (
        "tools.show_plan",
        "{config} --world-size 0",
        "--world-size = 0: give a whole number from 1 to",
    ),
    (
        "tools.show_plan",
        "{config} --world-size 99999999999999999999",
        "--world-size = 99999999999999999999: give a whole number from 1 to",
    ),
    (
        "tools.show_plan",
        "{config} --world-size 8 --gpu h10",
        "--gpu = h10: not known. Did you mean h100? Use one of: a100, h100, ",
    ),
    (
        "tools.show_plan",
        "{config} --gpu h100",
        "--gpu = h100: says nothing without a number of GPUs. Add --world-size N",
    ),
    (
        "tools.lr_transfer",
        "sweep {config} --out x --lr=-8",
        "--lr = -8: -8: give a finite number above 0 and of at most 1024.",
    ),
    (
        "tools.lr_transfer",
        "sweep {config} --out x --lr -8:-7:0",
        "--lr = -8:-7:0: give a whole number from 1 to 100.",
    ),
    ("tools.lr_transfer", "sweep {config} --out x --lr -7:-8", "LOW = -7 is above HIGH = -8"),
    (
        "tools.lr_transfer",
        "sweep {config} --out x --lr -8:nan",
        "--lr = -8:nan: give a finite number",
    ),
    (
        "tools.lr_transfer",
        "sweep {config} --out x --lr 0,1e-3",
        "--lr = 0,1e-3: 0: give a finite number above 0",
    ),
    (
        "tools.lr_transfer",
        "sweep {config} --out x --lr -8:-7 --seeds 0",
        "--seeds = 0: give a whole number from 1 to 1000.",
    ),
    (
        "tools.lr_transfer",
        "sweep {config} --out x --lr -8:-7 --depths 2,-4,0",
        "--depths = 2,-4,0: -4, 0: give a whole number from 1 to",
    ),
    (
        "tools.coordinate_check",
        "{config} --depths 1,2 --steps 0",
        "--steps = 0: give a whole number from 1 to",
    ),
    (
        "tools.coordinate_check",
        "{config} --depths 1,2 --seeds 0",
        "--seeds = 0: give a whole number from 1 to",
    ),
    (
        "tools.coordinate_check",
        "{config} --depths 0,2",
        "--depths = 0,2: 0: give a whole number from 1 to",
    ),
    (
        "tools.coordinate_check",
        "{config} --depths 1,2 --beside mup,m",
        "--beside = mup,m: m: not known.",
    ),
    ("tools.laziness", "{config} --seeds 0", "--seeds = 0: give a whole number from 1 to"),
    ("tools.draw_step", "--ranks 0", "--ranks = 0: give a whole number from 1 to 256."),
    (
        "tools.draw_step",
        "--ranks 1000000000",
        "--ranks = 1000000000: give a whole number from 1 to 256.",
    ),
    (
        "tools.draw_step",
        "--ranks 5 --micro-batches 4",
        "--micro-batches = 4: fewer than --ranks = 5.",
    ),
    ("tools.draw_step", "--micro-batches 3", "--micro-batches = 3: fewer than --ranks = 4."),
    (
        "tools.draw_step",
        "--micro-batches 0 --bucket-megabytes inf",
        "2 problems in this command line",
    ),
    (
        "tools.generate",
        "{folder} --temperature -1",
        "--temperature = -1: give a finite number of at least 0.",
    ),
    (
        "tools.generate",
        "{folder} --top-p 1.5",
        "--top-p = 1.5: give a finite number above 0 and of at most 1.",
    ),
    (
        "tools.evaluate_model",
        "{folder} --token-file x --limit 0",
        "--limit = 0: give a whole number from 1 to",
    ),
    (
        "tools.dataset",
        "split {prefix} --shares 50,nan --output-prefix a b",
        "--shares = 50,nan: nan: give a finite number of at least 0.",
    ),
    (
        "tools.train_tokenizer",
        "--input {text} --output x --vocab-size -1",
        "--vocab-size = -1: give a whole number from 1 to",
    ),
    (
        "tools.preprocess_data",
        "--input {text} --output-prefix x --tokenizer-type bytes --workers 0",
        "--workers = 0: give a whole number",
    ),
    (
        "tools.preprocess_data",
        "--input {text} --output-prefix x --tokenizer-type bytes --max-document-megabytes 1e300",
        "--max-document-megabytes = 1e300: give a finite number above 0 and of at most",
    ),
    ("tools.benchmark_training", "--layers 0", "--layers = 0: give a whole number from 1 to"),
    (
        "tools.benchmark_kernels",
        "--device cpu --rows 0 5",
        "--rows = 0: give a whole number from 1 to",
    ),
    (
        "tools.tune_kernels",
        "--dry-run --arch sm_9000",
        "--arch = sm_9000: not known. Did you mean sm_90?",
    ),
    ("tools.tune_kernels", "--dry-run --hidden 0", "--hidden = 0: give a whole number from 1 to"),
    (
        "tools.import_hf",
        "{folder} x --seq-length 0",
        "--seq-length = 0: give a whole number from 1 to",
    ),
    ("tools.checkpoint", "prune {folder} --keep 0", "--keep = 0: give a whole number from 1 to"),
]


@pytest.mark.parametrize(
    ("tool", "words", "message"), NUMBERS, ids=[f"{tool} {words}" for tool, words, _ in NUMBERS]
)
def test_a_number_outside_its_range_is_refused(
    tool: str, words: str, message: str, place: dict[str, Path], call: Any
) -> None:
    usage = next(usage for usage in USAGES if usage.tool == tool)
    code, text = call(usage, [word.format(**place) for word in words.split()])
    assert code == 2 and message in text


PROCESSES = """
import contextlib, io, json, os, runpy, sys
tools = json.loads(sys.argv[1])
for tool in tools:  # imported once, so that each process below costs nothing but itself
    __import__(f"megatron_completep.{tool}")
for tool in tools:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(writing, stream)
        os.close(reading), os.close(writing)
        sys.argv = [tool, "--no-such-option"]
        del sys.modules[f"megatron_completep.{tool}"]
        try:
            runpy.run_module(f"megatron_completep.{tool}", run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            # Not through torch's own ending, which is slow and no matter of this test.
            os._exit(ended.code)
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    print(json.dumps([tool, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text]), flush=True)
"""


def test_a_mistake_ends_a_real_process_of_every_tool_with_one_message() -> None:
    program = [sys.executable, "-c", PROCESSES, json.dumps(TOOLS)]
    run = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    ended = [json.loads(line) for line in run.stdout.splitlines()]
    assert [tool for tool, _, _ in ended] == TOOLS
    for tool, code, text in ended:
        assert (
            code == 2
            and "error: " in text
            and "--no-such-option" in text
            and "Traceback" not in text
        ), tool
