"""The quickstart's own steps; the whole of it is run by `make quickstart`."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from megatron_completep.analysis.quickstart import gather_standard_library, layout_overrides
from megatron_completep.config import load_config
from megatron_completep.errors import ConfigError, DataError

CONFIG = str(Path(__file__).resolve().parents[2] / "configs/quickstart.yaml")


def fake_library(folder: Path, files: int) -> Path:
    library = folder / "lib"
    (library / "test").mkdir(parents=True)
    (library / "site-packages").mkdir()
    for number in range(files):
        (library / ("test" if number % 2 else "") / f"m{number:03}.py").write_text(f"# ä {number}\n")
    (library / "test" / "latin.py").write_bytes(b"# \xe4\n")
    (library / "site-packages" / "other.py").write_text("# not the standard library\n")
    return library


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    library = fake_library(tmp_path, 120)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    (tmp_path / "corpus").mkdir()
    return tmp_path / "corpus"


def test_documents_are_split_and_none_is_in_both(corpus: Path) -> None:
    found = gather_standard_library(corpus, lambda what, done, total: None)
    train, validation = ({document["path"] for document in read(corpus / f"{split}.jsonl")} for split in ("train", "validation"))
    assert len(train) + len(validation) == 120 == found["documents"] and not train & validation
    assert len(validation) == 3 and found["left_out"] == 1
    texts = [document["text"] for split in ("train", "validation") for document in read(corpus / f"{split}.jsonl")]
    assert sum(len(text.encode()) for text in texts) == found["bytes"]
    assert not any("not the standard library" in text for text in texts)


def test_a_corpus_that_is_there_is_kept_and_another_pythons_takes_the_tokenizer_away(corpus: Path) -> None:
    found = gather_standard_library(corpus, lambda what, done, total: None)
    (corpus / "tokenizer.model").write_text("")
    (corpus / "train.jsonl").write_text("kept")
    assert gather_standard_library(corpus, lambda what, done, total: None) == found
    assert (corpus / "train.jsonl").read_text() == "kept" and (corpus / "tokenizer.model").exists()
    (corpus / "corpus.json").write_text(json.dumps({**found, "python": "2.7"}))
    assert gather_standard_library(corpus, lambda what, done, total: None) == found
    assert (corpus / "train.jsonl").read_text() != "kept" and not (corpus / "tokenizer.model").exists()


def test_a_python_without_source_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="no source files"):
        gather_standard_library(tmp_path, lambda what, done, total: None)


@pytest.mark.parametrize(("processes", "expected"), [(1, 8), (2, 8), (4, 4), (8, 2), (16, 1)])
def test_every_gpu_gets_a_share_of_the_batch(processes: int, expected: int) -> None:
    assert layout_overrides(load_config(CONFIG), processes) == [f"training.micro_batch_size={expected}"]


@pytest.mark.parametrize("processes", [3, 32])
def test_a_batch_that_cannot_be_shared_is_refused(processes: int) -> None:
    with pytest.raises(ConfigError, match="cannot be shared"):
        layout_overrides(load_config(CONFIG), processes)
