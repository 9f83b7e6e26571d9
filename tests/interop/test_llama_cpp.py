"""llama.cpp's own tokenizer on exported vocabularies, where the packages `gguf` and
`llama-cpp-cffi` (a build of llama.cpp) are installed.

The vocabulary is written into a GGUF file as `convert_hf_to_gguf.py` writes it: from
`tokenizer.model` where there is one, else from `tokenizer.json`.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_completep.config.schema import TokenizerConfig
from megatron_completep.data.tokenizer import SPACE_MARK, build_tokenizer
from megatron_completep.interop.hf_tokenizer import write_tokenizer
from megatron_completep.interop.probes import PROBES, locale_names

# The fixtures are used by their names.
from tests.interop.test_hf_tokenizers import models, with_dummy_prefix  # noqa: F401

pytestmark = pytest.mark.slow
# The name by which llama.cpp knows a splitting pattern.
PRE_TOKENIZERS = {"gpt2_pattern": "gpt-2", "cl100k_pattern": "llama-bpe"}


def write_gguf(folder: Path, pre_tokenizer: str | None, mark: str = SPACE_MARK) -> str:
    """The vocabulary of an exported folder as a GGUF file without tensors.

    mark: what a SentencePiece model's pieces have for a space.
    """
    gguf: Any = pytest.importorskip("gguf")
    path = folder / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    if pre_tokenizer is None:
        write_sentencepiece(writer, folder / "tokenizer.model", mark)
    else:
        write_byte_level(writer, folder / "tokenizer.json", pre_tokenizer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def write_sentencepiece(writer: Any, path: Path, mark: str) -> None:
    messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto = messages.ModelProto()
    proto.ParseFromString(path.read_bytes())
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(
        [piece.piece.replace(SPACE_MARK, mark).encode() for piece in proto.pieces]
    )
    writer.add_token_scores([piece.score for piece in proto.pieces])
    writer.add_token_types([piece.type for piece in proto.pieces])  # of the same numbers
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
    writer.add_unk_token_id(0)


def write_byte_level(writer: Any, path: Path, pre_tokenizer: str) -> None:
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    special = {token["id"] for token in content["added_tokens"]}
    names = sorted(vocabulary, key=vocabulary.get)
    assert [vocabulary[name] for name in names] == list(range(len(names)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(names)
    writer.add_token_types([3 if index in special else 1 for index in range(len(names))])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])


class LlamaCpp:
    """The tokenizer in a GGUF file, by llama.cpp's C functions."""

    def __init__(self, path: str):
        library: Any = pytest.importorskip("llama.llama_cpp", exc_type=ImportError)
        self.lib = library.lib
        self.ffi = library.ffi
        parameters = self.lib.llama_model_default_params()
        parameters.vocab_only = True
        self.model = self.lib.llama_model_load_from_file(path.encode(), parameters)
        assert self.model != self.ffi.NULL
        self.vocabulary = self.lib.llama_model_get_vocab(self.model)

    def encode(self, text: str) -> list[int]:
        content = text.encode()
        room = 4 * len(content) + 8
        ids = self.ffi.new("int32_t[]", room)
        # Neither a beginning is added nor are names of special tokens read.
        count = self.lib.llama_tokenize(
            self.vocabulary, content, len(content), ids, room, False, False
        )
        assert count >= 0
        return list(ids[0:count])


@pytest.mark.parametrize("name", ["sentencepiece", "with_dummy_prefix", *PRE_TOKENIZERS])
def test_llama_cpp_encodes_a_megabyte_of_many_languages_as_training_did(
    name: str,
    models: dict[str, TokenizerConfig],  # noqa: F811
    with_dummy_prefix: TokenizerConfig,  # noqa: F811
    tmp_path: Path,
) -> None:
    settings = models.get(name, with_dummy_prefix)
    ours = build_tokenizer(settings)
    write_tokenizer(ours, tmp_path, 64, settings)
    theirs = LlamaCpp(write_gguf(tmp_path, PRE_TOKENIZERS.get(name)))
    texts = [*PROBES, *list(locale_names(None))[::2]]
    assert sum(len(text.encode()) for text in texts) > 1_000_000
    # It takes U+2581 for a space, and ends a text at a null character.
    compared = [text for text in texts if SPACE_MARK not in text and "\0" not in text]
    for text in compared:
        assert theirs.encode(text) == ours.encode(text), text[:60]
    if name == "sentencepiece":
        # The control: the pieces of tokenizer.json, which hold real spaces.
        spaced = LlamaCpp(write_gguf(tmp_path, None, mark=" "))
        assert len(spaced.encode(PROBES[0])) > len(ours.encode(PROBES[0]))
