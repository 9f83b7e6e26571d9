"""tools/train_tokenizer.py and tools/preprocess_data.py through their main functions."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_completep.config.schema import TokenizerConfig
from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.data.tokenizer import build_tokenizer
from megatron_completep.errors import DataError
from megatron_completep.tools import preprocess_data, train_tokenizer
from tests.support.commands import Programs

TEXT = Path(__file__).read_text("utf-8")


def test_from_raw_text_to_token_files(programs: Programs, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(3):
        (tmp_path / f"corpus/{number}.txt").write_text(TEXT[number:], "utf-8")
    model = tmp_path / "tokenizer.model"
    report = json.loads(
        programs.output(
            train_tokenizer.main,
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
    # Megatron's name
    out = programs.output(
        preprocess_data.main,
        *words,
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--workers",
        1,
        "--partitions",
        4,
    )
    assert f"{tmp_path}/data/x_text_document  3 documents" in out
    tokenizer = build_tokenizer(TokenizerConfig(type="sentencepiece", model=str(model)))
    data = IndexedDataset(tmp_path / "data/x_text_document")
    assert [tokenizer.decode(data.document(i).tolist()) for i in range(3)] == [
        TEXT[i:] for i in range(3)
    ]
    assert (data.sidecar or {})["tokenizer"] == tokenizer.identity()

    again: dict[str, Any] = json.loads(
        programs.output(preprocess_data.main, *words, "--tokenizer-type", "sentencepiece", "--json")
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
    programs: Programs, tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=message):
        programs.call(
            preprocess_data.main,
            "--input",
            tmp_path / "a.txt",
            "--output-prefix",
            tmp_path / "out",
            "--tokenizer-type",
            "bytes",
            *words,
        )


def test_shards_end_with_what_to_do_next(programs: Programs, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    words = [
        "--input",
        tmp_path / "a.txt",
        "--output-prefix",
        tmp_path / "out",
        "--tokenizer-type",
        "bytes",
    ]
    assert "shard 0/1 complete. Run the same command without --shard" in programs.output(
        preprocess_data.main, *words, "--shard", "0/1", "--workers", 1
    )
    assert "complete" in programs.output(preprocess_data.main, *words)


def test_help_shows_an_example(programs: Programs) -> None:
    for tool in (preprocess_data, train_tokenizer):
        assert "Example" in programs.output(tool.main, "--help")
