"""Every program through the same mistakes, in process.

One message names what was given, the exit code is right, and there is no traceback.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_completep.data.files import printable
from megatron_completep.errors import INTERRUPTED
from tests.tools.usages import ROOT, TOOLS, USAGES, Usage, break_in, fill, only, usage_name


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
