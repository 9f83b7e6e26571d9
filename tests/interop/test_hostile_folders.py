"""Broken and hostile Hugging Face folders and tokenizers are refused by name,
and leave nothing behind.
"""

from __future__ import annotations

import base64
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from megatron_completep.config.schema import ModelConfig, TokenizerConfig
from megatron_completep.data.tokenizer import build_tokenizer
from megatron_completep.errors import DataError, UserError
from megatron_completep.interop.hf_config import from_hf
from megatron_completep.interop.import_model import import_model
from megatron_completep.interop.pieces import Folding, pieces
from megatron_completep.interop.tensor_files import TensorFolder

CONFIG = {
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}


def write_folder(folder: Path) -> Path:
    """A Llama of one layer, with a tokenizer of bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    _, model = from_hf(CONFIG, "config.json")
    wanted = pieces("llama", ModelConfig.model_validate(model), Folding())
    safetensors.torch.save_file(
        {piece.name: torch.zeros(piece.shape) for piece in wanted}, folder / "model.safetensors"
    )
    vocabulary = {chr(0x100 + number): number for number in range(20)}
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": vocabulary, "merges": []}})
    )
    return folder


def change_config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def write(name: str, text: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(
        text.encode() if isinstance(text, str) else text
    )


def shard(weight_map: Any) -> Callable[[Path], object]:
    """An index in place of the single file, which becomes a.safetensors."""

    def spoil(folder: Path) -> None:
        names = list(TensorFolder(folder).names)
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        listed = weight_map(names) if callable(weight_map) else weight_map
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))

    return spoil


def link_out(name: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        outside = folder.parent / f"outside_{name}"
        if (folder / name).exists():
            (folder / name).rename(outside)
        else:
            outside.write_text("{}")
        (folder / name).symlink_to(outside)

    return spoil


def lying_header(folder: Path) -> None:
    """The header says that the tensors end after the file does."""
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    (folder / "model.safetensors").write_bytes(data[: 8 + length + 16])


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "nested config": (
        write("config.json", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        "nested more than 100 deep",
    ),
    "nested config, less": (
        write("config.json", '{"a": ' + "[" * 500 + "]" * 500 + "}"),
        "nested more than 100 deep",
    ),
    "NaN": (
        write("config.json", json.dumps({**CONFIG, "rms_norm_eps": float("nan")})),
        "NaN is no number of JSON",
    ),
    "Infinity": (
        write("config.json", json.dumps({**CONFIG, "rope_theta": float("inf")})),
        "Infinity is no number of JSON",
    ),
    "larger than float64": (
        write("config.json", json.dumps(CONFIG)[:-1] + ', "rope_theta": 1e999}'),
        "larger than any float64",
    ),
    "digits": (
        write("config.json", json.dumps(CONFIG)[:-1] + f', "rope_theta": {"9" * 5000}}}'),
        "not JSON",
    ),
    "a huge integer": (change_config(rope_theta=10**400), "rope_theta = 1000"),
    "layers without end": (
        change_config(num_hidden_layers=10**12),
        "num_hidden_layers = 1000000000000: expected a whole number",
    ),
    "a huge width": (
        change_config(hidden_size=1e300),
        "hidden_size = 1e+300: expected a whole number",
    ),
    "a width of text": (
        change_config(hidden_size="8"),
        "hidden_size = '8': expected a whole number",
    ),
    "a width of lists": (
        change_config(hidden_size=[8]),
        "hidden_size = [8]: expected a whole number",
    ),
    "a type of lists": (change_config(model_type=["llama"]), "model_type = ['llama']"),
    "an activation of lists": (change_config(hidden_act=[[]]), "hidden_act = [[]]"),
    "a width that is not there": (
        change_config(hidden_size=None),
        "hidden_size is missing: expected a whole number",
    ),
    "biases of attention alone": (
        change_config(rope_scaling=None, attention_bias=True),
        "attention_bias = true, mlp_bias = false: our",
    ),
    "a flag of text": (
        change_config(tie_word_embeddings="false"),
        "tie_word_embeddings = 'false': expected true or false",
    ),
    "rope of numbers": (change_config(rope_scaling=[1]), "rope_scaling of type [1]"),
    "heads that do not divide": (
        change_config(num_attention_heads=3),
        "not those of its config.json",
    ),
    "a list": (write("config.json", "[]"), "not a JSON object"),
    "not UTF-8": (write("config.json", b'{"a": "\xff"}'), "not JSON"),
    "a linked config": (link_out("config.json"), "a symbolic link to"),
    "linked weights": (link_out("model.safetensors"), "a symbolic link to"),
    "a linked tokenizer": (link_out("tokenizer.json"), "a symbolic link to"),
    "a linked companion": (link_out("tokenizer_config.json"), "a symbolic link to"),
    "a link to nothing": (
        lambda folder: (folder / "model.safetensors.index.json").symlink_to("none"),
        "there is no such file",
    ),
    "a shard above": (
        shard(lambda names: dict.fromkeys(names, "../a.safetensors")),
        "'../a.safetensors', which is not in this folder",
    ),
    "a shard of the system": (
        shard(lambda names: dict.fromkeys(names, "/etc/passwd")),
        "'/etc/passwd', which is not in this folder",
    ),
    "a missing shard": (
        shard(lambda names: dict.fromkeys(names, "b.safetensors")),
        "'b.safetensors', which is not in this folder",
    ),
    "a folder as a shard": (
        shard(lambda names: dict.fromkeys(names, "..")),
        "'..', which is not in this folder",
    ),
    "a shard that is a number": (shard({"a": 5}), "not an index of safetensors files"),
    "an index of lists": (shard([["a", "b"]]), "not an index of safetensors files"),
    "a tensor that its shard does not hold": (
        shard(lambda names: dict.fromkeys([*names, "more"], "a.safetensors")),
        "no such tensor",
    ),
    "an index that invents a tensor": (
        shard(
            lambda names: dict.fromkeys(
                [*names[:-1], "lm_head.weight", "x.rotary_emb.inv_freq"], "a.safetensors"
            )
        ),
        "not those of its config.json",
    ),
    "a nested index": (
        lambda folder: (
            shard({})(folder),
            write("model.safetensors.index.json", "[" * 3000 + "]" * 3000)(folder),
        ),
        "nested more than 100 deep",
    ),
    "a header that lies": (lying_header, "not a safetensors file"),
    "an empty vocabulary": (
        write("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'),
        "vocabulary is empty",
    ),
    "an unknown tokenizer": (
        write("tokenizer.json", '{"model": {"type": "Magic", "vocab": {"a": 0}}}'),
        "not a Hugging Face tokenizer",
    ),
    "a nested tokenizer": (write("tokenizer.json", "[" * 100_000), "not a Hugging Face tokenizer"),
    "an id of four thousand millions": (
        write(
            "tokenizer.json",
            json.dumps(
                {
                    "model": {
                        "type": "WordPiece",
                        "vocab": {"a": 4 * 10**9},
                        "unk_token": "a",
                        "continuing_subword_prefix": "#",
                        "max_input_chars_per_word": 9,
                    }
                }
            ),
        ),
        "ids go up to",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused_by_name_and_nothing_is_left(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    spoil, words = HOSTILE[name]
    spoil(folder)
    with pytest.raises(UserError) as refused:
        import_model(folder, tmp_path / "runs" / "new")
    assert words in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_the_folder_is_imported_where_nothing_is_wrong_with_it(tmp_path: Path) -> None:
    report = import_model(write_folder(tmp_path / "model"), tmp_path / "runs" / "new")
    assert Path(report.config).is_file() and report.tokenizer == "huggingface"
    assert (tmp_path / "runs" / "new" / "tokenizer" / "tokenizer.json").is_file()


def test_a_failure_after_the_first_byte_takes_away_what_was_written_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = write_folder(tmp_path / "model"), tmp_path / "run"
    output.mkdir()
    (output / "notes.txt").write_text("mine")

    def breaks(self: TensorFolder, name: str) -> torch.Tensor:
        raise DataError(f"{self.folder}: {name} cannot be read")

    monkeypatch.setattr(TensorFolder, "value", breaks)
    with pytest.raises(DataError, match="cannot be read"):
        import_model(folder, output)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


def test_the_links_of_hugging_faces_own_cache_are_followed_and_no_others(tmp_path: Path) -> None:
    original, cache = write_folder(tmp_path / "model"), tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(original.iterdir())):
        path.rename(cache / "blobs" / f"{number}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number}")
    assert Path(import_model(snapshot, tmp_path / "run").checkpoint).is_dir()
    (snapshot / "config.json").unlink()
    os.rename(cache / "blobs" / "0", cache / "config.json")
    (snapshot / "config.json").symlink_to("../../config.json")
    with pytest.raises(DataError, match="a symbolic link to"):
        import_model(snapshot, tmp_path / "other")


def ranks_of(tokens: list[tuple[bytes, int]]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in tokens)


BYTES = [(bytes([byte]), byte) for byte in range(256)]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([*BYTES, (b"ab", 300), (b"cd", 300)], "lines 257 and 258 have the same rank"),
        ([*BYTES, (b"ab", 0)], "lines 1 and 257 have the same rank"),
        ([*BYTES, (b"ab", 256), (b"ab", 257)], "a token stands there twice"),
        ([*BYTES, (b"ab", -1)], "ranks go from -1"),
        ([*BYTES, (b"ab", 10**12)], "ranks go from 0 to 1000000000000"),
    ],
)
def test_ranks_that_are_no_ids_are_refused(
    tokens: list[tuple[bytes, int]], words: str, tmp_path: Path
) -> None:
    (tmp_path / "gpt2.tiktoken").write_bytes(ranks_of(tokens))
    with pytest.raises(DataError, match=words):
        build_tokenizer(TokenizerConfig(type="tiktoken", model=str(tmp_path / "gpt2.tiktoken")))


def test_ranks_with_holes_are_read(tmp_path: Path) -> None:
    (tmp_path / "gpt2.tiktoken").write_bytes(ranks_of([*BYTES, (b"ab", 300)]))
    tokenizer = build_tokenizer(
        TokenizerConfig(type="tiktoken", model=str(tmp_path / "gpt2.tiktoken"))
    )
    assert tokenizer.encode("ab") == [300] and tokenizer.eod_id == 301


def test_a_character_that_a_vocabulary_cannot_express_is_said_without_a_traceback(
    tmp_path: Path,
) -> None:
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}})
    )
    tokenizer = build_tokenizer(
        TokenizerConfig(type="huggingface", model=str(tmp_path / "tokenizer.json"))
    )
    with pytest.raises(DataError, match="a text cannot be encoded"):
        tokenizer.encode("b")
