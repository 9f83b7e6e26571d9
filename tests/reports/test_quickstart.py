"""The quickstart's own steps; the whole of it is run by `make quickstart`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from megatron_completep.config import load_config
from megatron_completep.errors import ConfigError, DataError
from megatron_completep.reports.quickstart import gather_standard_library, layout_overrides

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/quickstart.yaml")


def fake_library(folder: Path, files: int) -> Path:
    library = folder / "lib"
    (library / "test").mkdir(parents=True)
    (library / "site-packages").mkdir()
    for number in range(files):
        (library / ("test" if number % 2 else "") / f"m{number:03}.py").write_text(
            f"# ä {number}\n"
        )
    (library / "test" / "latin.py").write_bytes(b"# \xe4\n")
    (library / "site-packages" / "other.py").write_text("# not the standard library\n")
    return library


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    library = fake_library(tmp_path, 120)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    (tmp_path / "corpus").mkdir()
    return tmp_path / "corpus"


def test_documents_are_split_and_none_is_in_both(corpus: Path) -> None:
    found = gather_standard_library(corpus, lambda what, done, total: None)
    train, validation = (
        {document["path"] for document in read(corpus / f"{split}.jsonl")}
        for split in ("train", "validation")
    )
    assert len(train) + len(validation) == 120 == found["documents"] and not train & validation
    assert len(validation) == 3 and found["left_out"] == 1
    texts = [
        document["text"]
        for split in ("train", "validation")
        for document in read(corpus / f"{split}.jsonl")
    ]
    assert sum(len(text.encode()) for text in texts) == found["bytes"]
    assert not any("not the standard library" in text for text in texts)


def test_a_corpus_that_is_there_is_kept_and_another_pythons_takes_the_tokenizer_away(
    corpus: Path,
) -> None:
    found = gather_standard_library(corpus, lambda what, done, total: None)
    (corpus / "tokenizer.model").write_text("")
    (corpus / "train.jsonl").write_text("kept")
    assert gather_standard_library(corpus, lambda what, done, total: None) == found
    assert (corpus / "train.jsonl").read_text() == "kept" and (corpus / "tokenizer.model").exists()
    (corpus / "corpus.json").write_text(json.dumps({**found, "python": "2.7"}))
    assert gather_standard_library(corpus, lambda what, done, total: None) == found
    assert (corpus / "train.jsonl").read_text() != "kept"
    assert not (corpus / "tokenizer.model").exists()


def test_a_python_without_source_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="no source files"):
        gather_standard_library(tmp_path, lambda what, done, total: None)


@pytest.mark.parametrize(("processes", "expected"), [(1, 8), (2, 8), (4, 4), (8, 2), (16, 1)])
def test_every_gpu_gets_a_share_of_the_batch(processes: int, expected: int) -> None:
    assert layout_overrides(load_config(CONFIG), processes) == [
        f"training.micro_batch_size={expected}"
    ]


@pytest.mark.parametrize("processes", [3, 32])
def test_a_batch_that_cannot_be_shared_is_refused(processes: int) -> None:
    with pytest.raises(ConfigError, match="cannot be shared"):
        layout_overrides(load_config(CONFIG), processes)


@pytest.mark.slow
def test_the_whole_quickstart_leaves_what_it_promises(tmp_path: Path) -> None:
    """On a small model; a second call finds everything done and ends with the same loss."""
    words = {
        "model.num_layers": 4,
        "model.hidden_size": 64,
        "model.ffn_hidden_size": 128,
        "model.seq_length": 64,
        "completep.base_hidden_size": 64,
        "completep.base_ffn_hidden_size": 128,
        "completep.base_head_dim": 16,
        "data.train.0.prefix": tmp_path / "data/train_text_document",
        "data.validation.0.prefix": tmp_path / "data/validation_text_document",
        "data.tokenizer.model": tmp_path / "data/tokenizer.model",
        "training.output_dir": tmp_path / "run",
        "training.device": "cpu",
    }
    overrides = [f"{name}={value}" for name, value in words.items()]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/quickstart.py", *arguments, *overrides]
        return subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=280,
        )

    first = run("--goal", "0.5")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "resumed after step 60" in first.stdout
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {
        "report.html",
        "report.md",
        "loss.png",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "config.yaml",
    } <= names
    rows = read(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 121))
    assert (
        f"Validation loss {rows[-1]['validation_loss']:.4f}"
        in (tmp_path / "run" / "report.md").read_text()
    )
    second = run("--goal", "8")  # nobody reaches that: the check can fail
    assert second.returncode == 1 and "this is less" in second.stdout
    assert read(tmp_path / "run" / "metrics.jsonl") == rows
