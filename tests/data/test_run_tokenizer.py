"""A run keeps a copy of its tokenizer:
generation, evaluation, export and a resume find it when the original is gone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_completep.config import Config
from megatron_completep.config.schema import DataConfig, TokenizerConfig
from megatron_completep.data.run_tokenizer import (
    available_tokenizer,
    copy_in,
    keep_tokenizer,
    with_readable_tokenizer,
)
from megatron_completep.data.tokenizer import build_tokenizer, guess_type
from megatron_completep.errors import DataError
from megatron_completep.preprocess.tokenizer_training import TrainingSettings, train_tokenizer
from megatron_completep.pretrain import pretrain
from megatron_completep.run.state import ExitCode
from megatron_completep.tools import dataset, evaluate_model, export_hf, generate
from tests.support.commands import Programs
from tests.support.corpora import write_documents
from tests.support.runs import VOCABULARY, tiny_config

WORDS = [f"w{number}" for number in range(VOCABULARY - 2)]


def write_words(folder: Path) -> Path:
    """A Hugging Face folder whose tokenizer has one id a word."""
    tokenizers = pytest.importorskip("tokenizers")
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: i for i, word in enumerate([*WORDS, "[UNK]", "<eos>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return folder


def write_model(path: Path) -> Path:
    (path.parent / "text.txt").write_text("some words to learn from. " * 200)
    train_tokenizer(TrainingSettings((str(path.parent / "text.txt"),), 280), str(path))
    return path


def write_ranks(path: Path) -> Path:
    import base64

    tokens = [bytes([byte]) for byte in range(256)] + [b"so", b"some"]
    path.write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    )
    return path


def settings_of(folder: Path, family: str) -> TokenizerConfig:
    if family == "huggingface":
        return TokenizerConfig(type="huggingface", model=str(write_words(folder / "words")))
    if family == "sentencepiece":
        return TokenizerConfig(type="sentencepiece", model=str(write_model(folder / "t.model")))
    return TokenizerConfig(
        type="tiktoken", model=f"cl100k_base:{write_ranks(folder / 'mine.tiktoken')}"
    )


FAMILIES = ("huggingface", "sentencepiece", "tiktoken")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_the_same_tokenizer_wherever_the_run_moves(tmp_path: Path, family: str) -> None:
    settings = settings_of(tmp_path, family)
    original = build_tokenizer(settings)
    (tmp_path / "run").mkdir()
    assert keep_tokenizer(settings, tmp_path / "run") is None
    assert keep_tokenizer(settings, tmp_path / "run") is None  # a second start finds it
    (tmp_path / "run").rename(tmp_path / "moved")
    for path in tmp_path.iterdir():
        if path.name != "moved":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    copy = build_tokenizer(available_tokenizer(settings, tmp_path / "moved"))
    assert (copy.hash, copy.eod_id) == (original.hash, original.eod_id)
    assert copy.encode("some words w3 w7") == original.encode("some words w3 w7")
    with pytest.raises(DataError, match="cannot be read"):
        build_tokenizer(settings)  # the control: the original is gone


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_original_does_not_change_what_the_run_decodes_with(
    tmp_path: Path, family: str
) -> None:
    settings = settings_of(tmp_path, family)
    keep_tokenizer(settings, tmp_path)
    before = build_tokenizer(available_tokenizer(settings, tmp_path)).hash
    path = Path(str(settings.model).rpartition(":")[2])
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert build_tokenizer(available_tokenizer(settings, tmp_path)).hash == before


def test_a_damaged_copy_is_refused_by_name(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "huggingface")
    keep_tokenizer(settings, tmp_path)
    for name in ("record.json", "tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / "tokenizer" / name
        content = path.read_bytes()
        path.write_bytes(
            content.replace(b"eos", b"eoS", 1)
            if b"eos" in content
            else content.replace(b"hugging", b"huggonG")
        )
        with pytest.raises(
            DataError, match=rf"tokenizer/{name}: .*remove the folder to use data\.tokenizer again"
        ):
            available_tokenizer(settings, tmp_path)
        path.write_bytes(content)
    assert available_tokenizer(settings, tmp_path).model == str(
        tmp_path / "tokenizer" / "tokenizer.json"
    )
    (tmp_path / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer_config\.json: No such file"):
        available_tokenizer(settings, tmp_path)


def test_a_folder_of_the_users_own_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("mine")
    settings = settings_of(tmp_path, "huggingface")
    said = keep_tokenizer(settings, tmp_path)
    assert said is not None and "tokenizer.json there is another file" in said
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_text() == "mine"
    assert available_tokenizer(settings, tmp_path) == settings
    imported = TokenizerConfig(
        type="huggingface", model=str(write_words(tmp_path / "b" / "tokenizer"))
    )
    # As an import lays it there: it is the copy.
    assert keep_tokenizer(imported, tmp_path / "b") is None
    assert copy_in(tmp_path / "b" / "tokenizer") is not None


def test_a_tokenizer_that_cannot_be_copied_does_not_end_a_run(tmp_path: Path) -> None:
    said = keep_tokenizer(
        TokenizerConfig(type="sentencepiece", model=str(tmp_path / "absent.model")), tmp_path
    )
    assert said is not None
    assert said.startswith("warning: no copy of the tokenizer is kept")
    assert "absent.model" in said
    assert keep_tokenizer(TokenizerConfig(type="bytes"), tmp_path) is None
    assert keep_tokenizer(None, tmp_path) is None
    assert not (tmp_path / "tokenizer").exists()


def test_only_a_tokenizer_that_is_gone_is_replaced_at_a_start(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "sentencepiece")
    data = DataConfig.model_validate({"train": [{"prefix": "a"}], "tokenizer": settings})
    keep_tokenizer(settings, tmp_path)
    assert with_readable_tokenizer(data, tmp_path) == data
    (tmp_path / "t.model").unlink()
    assert (
        with_readable_tokenizer(data, tmp_path).tokenizer
        == available_tokenizer(settings, tmp_path)
        != settings
    )


def test_a_family_is_guessed_from_a_name_or_from_the_content(tmp_path: Path) -> None:
    words = write_words(tmp_path / "words")
    model = write_model(tmp_path / "t.model")
    ranks = write_ranks(tmp_path / "gpt2.tiktoken")
    shutil.copy(words / "tokenizer.json", tmp_path / "plain")
    shutil.copy(model, tmp_path / "spm")
    named = [
        words,
        words / "tokenizer.json",
        tmp_path / "plain",
        model,
        tmp_path / "spm",
        ranks,
        "cl100k_base",
        f"gpt2:{ranks}",
    ]
    expected = ["huggingface"] * 3 + ["sentencepiece"] * 2 + ["tiktoken"] * 3
    assert [guess_type(str(name)) for name in named] == expected


# A whole run


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run saved after one step of two,
    over a corpus that records its tokenizer, whose file is gone by now.
    """
    folder = tmp_path_factory.mktemp("moved")
    words = write_words(folder / "words")
    identity = dict(
        build_tokenizer(TokenizerConfig(type="huggingface", model=str(words))).identity()
    )
    generator = np.random.default_rng(0)
    end = VOCABULARY - 1
    documents = [[np.append(generator.integers(0, len(WORDS), 20), end)] for _ in range(30)]
    write_documents(folder / "train", documents, tokenizer=identity)
    data: dict[str, Any] = {
        "validation": None,
        "tokenizer": {"type": "huggingface", "model": str(words)},
    }
    data["train"] = [{"prefix": str(folder / "train")}]
    config = tiny_config(
        folder,
        "training.train_steps=2",
        "training.stop_at_step=1",
        "checkpoint.interval=1",
        data=data,
    )
    assert pretrain(config) == ExitCode.DONE
    shutil.rmtree(words)
    return config


def test_generation_evaluation_and_export_use_the_copy(
    moved: Config, programs: Programs, tmp_path: Path
) -> None:
    run = Path(moved.training.output_dir)
    options = ("--device", "cpu", "--precision", "float32")
    for checkpoint in (run, run / "checkpoints/step_00000001"):
        prompt = ("--prompt", "w1 w2", "--max-new-tokens", 4, "--json")
        printed = programs.output(generate.main, checkpoint, *prompt, *options)
        assert json.loads(printed)["results"][0]["texts"][0]
    texts = ("--token-file", run.parent / "train", "--limit", 3)
    assert "bits per byte" in programs.output(evaluate_model.main, run, *texts, *options)
    programs.output(export_hf.main, run, tmp_path / "hf", "--json")
    exported = (tmp_path / "hf" / "tokenizer.json").read_bytes()
    assert exported == (run / "tokenizer" / "tokenizer.json").read_bytes()
    # A tokenizer that is named stands before the copy.
    refused = programs.run(generate.main, run, "--tokenizer-model", tmp_path / "absent", *options)
    assert refused.code == 2 and "absent" in refused.err


def test_the_resume_and_the_samples_of_a_step_use_the_copy(
    moved: Config, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(moved.training.output_dir)
    sample = ("sample", run / "config.yaml", "--step", 1)
    assert " w" in programs.output(dataset.main, *sample)
    copy = ("--tokenizer-model", run / "tokenizer")
    inspect = ("inspect", run.parent / "train", *copy, "--documents", 1)
    out = programs.output(dataset.main, *inspect)
    assert " w" in out and "not at hand" not in out
    resumed = moved.model_copy(
        update={"training": moved.training.model_copy(update={"stop_at_step": None})}
    )
    capsys.readouterr()
    assert pretrain(resumed) == ExitCode.DONE
    assert "no copy of the tokenizer" not in capsys.readouterr().out
