"""tools/train_tokenizer.py and tools/preprocess_data.py through their main functions."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_completep.config.schema import TokenizerConfig
from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.data.tokenizer import build_tokenizer
from megatron_completep.errors import DataError
from megatron_completep.tools import preprocess_data, train_tokenizer

TEXT = Path(__file__).read_text("utf-8")
RunTool = Callable[..., str]


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunTool:
    def run(tool: ModuleType, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, words)])
        assert tool.main() == 0
        return capsys.readouterr().out

    return run


def test_from_raw_text_to_token_files(run_tool: RunTool, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(3):
        (tmp_path / f"corpus/{number}.txt").write_text(TEXT[number:], "utf-8")
    model = tmp_path / "tokenizer.model"
    report = json.loads(
        run_tool(
            train_tokenizer,
            "--input",
            tmp_path / "corpus",
            "--output",
            model,
            "--vocab-size",
            500,
            "--json",
        )
    )
    assert report["tokenizer"]["vocab_size"] == 500

    words = [
        "--input",
        tmp_path / "corpus",
        "--output-prefix",
        tmp_path / "data/x",
        "--append-eod",
        "--tokenizer-model",
        model,
    ]
    out = run_tool(
        preprocess_data,
        *words,
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--workers",
        1,
        "--partitions",
        4,
    )  # Megatron's name
    assert f"{tmp_path}/data/x_text_document  3 documents" in out
    tokenizer = build_tokenizer(TokenizerConfig(type="sentencepiece", model=str(model)))
    data = IndexedDataset(tmp_path / "data/x_text_document")
    assert [tokenizer.decode(data.document(i).tolist()) for i in range(3)] == [
        TEXT[i:] for i in range(3)
    ]
    assert (data.sidecar or {})["tokenizer"] == tokenizer.identity()

    again: dict[str, Any] = json.loads(
        run_tool(preprocess_data, *words, "--tokenizer-type", "sentencepiece", "--json")
    )
    assert (again["status"], again["documents"]) == ("already complete", 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shard", "3/3"], "--shard 3/3: give I/N"),
        (["--shard", "x"], "--shard x: give I/N"),
        (["--tokenizer-type", "sentencepiece"], "needs a model"),
        (
            ["--tokenizer-model", "x.model"],
            "--tokenizer-model = x.model: --tokenizer-type bytes reads no model.",
        ),
        (
            ["--min-tokens", "3", "--max-tokens", "2"],
            "--min-tokens = 3: above --max-tokens = 2, so every document would be dropped.",
        ),
        (
            ["--min-characters", "1", "--max-characters", "0"],
            "--min-characters = 1: above --max-characters = 0",
        ),
        (["--output-prefix", ""], "--output-prefix is empty."),
        (["--json-keys", "a", "a"], "--json-keys a a: give each key once."),
    ],
)
def test_a_wrong_option_is_one_clear_error(
    run_tool: RunTool, tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=message):
        run_tool(
            preprocess_data,
            "--input",
            tmp_path / "a.txt",
            "--output-prefix",
            tmp_path / "out",
            "--tokenizer-type",
            "bytes",
            *words,
        )


def test_shards_end_with_what_to_do_next(run_tool: RunTool, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    words = [
        "--input",
        tmp_path / "a.txt",
        "--output-prefix",
        tmp_path / "out",
        "--tokenizer-type",
        "bytes",
    ]
    assert "shard 0/1 complete. Run the same command without --shard" in run_tool(
        preprocess_data, *words, "--shard", "0/1", "--workers", 1
    )
    assert "complete" in run_tool(preprocess_data, *words)


def test_help_shows_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for tool in (preprocess_data, train_tokenizer):
        monkeypatch.setattr(sys, "argv", ["tool", "--help"])
        with pytest.raises(SystemExit):
            tool.main()
        assert "Example" in capsys.readouterr().out
