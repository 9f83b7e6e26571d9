"""Tokenizers: lossless round trips, agreement with each library, errors."""

import base64
import importlib
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_completep.config.schema import TokenizerConfig
from megatron_completep.data.tiktoken_tokenizer import TIKTOKEN_ENCODINGS
from megatron_completep.data.tokenizer import SPACE_MARK, Tokenizer, build_tokenizer
from megatron_completep.errors import DataError
from megatron_completep.preprocess.tokenizer_training import TrainingSettings, train_tokenizer

CODE = Path(__file__).read_text("utf-8")
AWKWARD = [
    *(
        "",
        " ",
        "\0",
        "a\0b",
        "\t\tx",
        "\r\n",
        " \r",
        "\n\n\n",
        "  lead",
        "trail  ",
        "a   b",
        SPACE_MARK,
        f" {SPACE_MARK}a {SPACE_MARK}",
    ),
    *(
        "\ufffd",
        "\u2585",
        " ⁇ ",
        "<unk>",
        "<|endoftext|>",
        "<0x41>",
        "\ufeffx\u200b",
        "\x1b[0m\x7f\x85\u2028",
        "e\u0301é",
        "日本語 テキスト",
    ),
    *("👩\u200d👩\u200d👧🇪🇺", "\U0010ffff\ue000\ufdd0"),
]


@pytest.fixture(scope="module")
def sentencepiece_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "code.txt").write_text(CODE * 3 + "\n".join(AWKWARD[3:5]), "utf-8")
    for kind in ("bpe", "unigram"):
        train_tokenizer(
            TrainingSettings((str(folder / "code.txt"),), 600, kind, special_tokens=("<|pad|>",)),
            str(folder / f"{kind}.model"),
        )
    return {kind: str(folder / f"{kind}.model") for kind in ("bpe", "unigram")}


@pytest.fixture(scope="module")
def tokenizers_of_all_types(sentencepiece_models: dict[str, str]) -> dict[str, Tokenizer]:
    folder = Path(sentencepiece_models["bpe"]).parent
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        [CODE],
        tokenizers.trainers.BpeTrainer(
            vocab_size=500,
            initial_alphabet=alphabet,
            special_tokens=["<|endoftext|>"],
            show_progress=False,
        ),
    )
    library.save(str(folder / "tokenizer.json"))
    ranks = [bytes([byte]) for byte in range(256)] + [b" t", b"th", b" th", b"he", b"    "]
    (folder / "small.tiktoken").write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    )
    models = {
        "sentencepiece": sentencepiece_models["bpe"],
        "huggingface": str(folder / "tokenizer.json"),
        "tiktoken": f"cl100k_base:{folder / 'small.tiktoken'}",
        "bytes": None,
    }
    return {
        name: build_tokenizer(TokenizerConfig(type=name, model=model))
        for name, model in models.items()
    }  # type: ignore[arg-type]


TYPES = ("sentencepiece", "huggingface", "tiktoken", "bytes")


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("text", [*AWKWARD, CODE])
def test_decoding_gives_the_text_back(
    tokenizers_of_all_types: dict[str, Tokenizer], name: str, text: str
) -> None:
    tokenizer = tokenizers_of_all_types[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.eod_id not in ids


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
PIECES = st.lists(
    st.sampled_from([*AWKWARD, "def f(x):\n", "    return", "\r\n\t", "é", "x" * 20]) | TEXT,
    max_size=12,
).map("".join)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_trained_sentencepiece_is_lossless_for_any_text(
    sentencepiece_models: dict[str, str], kind: str
) -> None:
    tokenizer = build_tokenizer(
        TokenizerConfig(type="sentencepiece", model=sentencepiece_models[kind])
    )

    @settings(max_examples=400)
    @given(PIECES)
    @example("".join(map(chr, range(0x300))))
    @example(" " * 5000 + "\n")
    def check(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)).encode() == text.encode()

    check()


def test_sentencepiece_defaults_are_not_lossless(tmp_path: Path) -> None:
    """The negative control: what the round trip would catch."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE.splitlines()),
        model_prefix=str(tmp_path / "default"),
        vocab_size=300,
        minloglevel=2,
    )
    tokenizer = build_tokenizer(
        TokenizerConfig(type="sentencepiece", model=str(tmp_path / "default.model"))
    )
    assert tokenizer.decode(tokenizer.encode("a  b\n")) != "a  b\n"


def test_ids_are_the_librarys_own(
    tokenizers_of_all_types: dict[str, Tokenizer], sentencepiece_models: dict[str, str]
) -> None:
    import sentencepiece

    texts = [CODE[i : i + 500] for i in range(0, 3000, 500)]
    folder = Path(sentencepiece_models["bpe"]).parent
    processor = sentencepiece.SentencePieceProcessor(model_file=sentencepiece_models["bpe"])
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    clear = [text.replace(SPACE_MARK, "") for text in texts]
    assert [
        ids.tolist() for ids in tokenizers_of_all_types["sentencepiece"].encode_batch(clear)
    ] == [processor.encode(text) for text in clear]
    clear = [text.replace("<|endoftext|>", "") for text in texts]
    assert [ids.tolist() for ids in tokenizers_of_all_types["huggingface"].encode_batch(clear)] == [
        library.encode(text).ids for text in clear
    ]
    assert tokenizers_of_all_types["bytes"].encode("é") == [0xC3, 0xA9]


def test_published_patterns_split_as_tiktokens_own() -> None:
    """tiktoken's patterns are read out of its constructors without a download;
    splits are compared by the library it splits with itself.
    """
    regex: Any = importlib.import_module("regex")  # tiktoken depends on it
    openai_public: Any = importlib.import_module("tiktoken_ext.openai_public")
    text = "".join([*AWKWARD, CODE, "it's 12345 WE'LL CamelCase  \n\n  x\r\n//\n é́  "])
    splits = {}
    for name, (pattern, _, eod_id) in TIKTOKEN_ENCODINGS.items():
        constructor = getattr(openai_public, name)
        no_download: dict[str, Any] = {
            "load_tiktoken_bpe": lambda *_, **__: {},
            "data_gym_to_mergeable_bpe_ranks": lambda *_, **__: {},
        }
        theirs = types.FunctionType(
            constructor.__code__, {**constructor.__globals__, **no_download}
        )()
        splits[name] = regex.findall(pattern, text)
        assert splits[name] == regex.findall(theirs["pat_str"], text), name
        assert theirs["special_tokens"]["<|endoftext|>"] == eod_id
    assert len({len(split) for split in splits.values()}) == 3, (
        "the text must tell the three patterns apart"
    )


@pytest.mark.parametrize("name", TYPES)
def test_batches_are_arrays_of_the_stored_type(
    tokenizers_of_all_types: dict[str, Tokenizer], name: str
) -> None:
    tokenizer = tokenizers_of_all_types[name]
    batch = tokenizer.encode_batch(["", "a b", CODE])
    assert [ids.dtype for ids in batch] == [np.dtype("uint16")] * 3
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in ("", "a b", CODE)]
    expected = {"type": name, "model": tokenizer.model_name, "hash": tokenizer.hash}
    assert tokenizer.identity() == {
        **expected,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
    }


@pytest.mark.parametrize("name", TYPES)
def test_wrong_ids_and_lone_surrogates_are_named(
    tokenizers_of_all_types: dict[str, Tokenizer], name: str
) -> None:
    tokenizer = tokenizers_of_all_types[name]
    with pytest.raises(DataError, match=rf"token id {tokenizer.vocab_size} at position 1"):
        tokenizer.decode([0, tokenizer.vocab_size])
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("ab\ud800")


def test_end_of_document_is_found_where_each_library_keeps_it(
    tokenizers_of_all_types: dict[str, Tokenizer], tmp_path: Path
) -> None:
    assert {name: t.eod_id for name, t in tokenizers_of_all_types.items()} == {
        "sentencepiece": 1,
        "huggingface": 0,
        "tiktoken": 261,
        "bytes": 256,
    }
    library = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "<stop>": 7, "</s>": 3}, unk_token="a")
    )
    library.save(str(tmp_path / "tokenizer.json"))
    assert build_tokenizer(TokenizerConfig(type="huggingface", model=str(tmp_path))).eod_id == 3
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<stop>"}})
    )
    tokenizer = build_tokenizer(TokenizerConfig(type="huggingface", model=str(tmp_path)))
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (7, 8)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("sentencepiece", "absent.model", None, "cannot be read"),
        ("sentencepiece", "bad.model", b"not a model", "not a SentencePiece model"),
        ("huggingface", "tokenizer.json", b"{}", "not a Hugging Face tokenizer"),
        ("tiktoken", "cl100k_base.tiktoken", b"YQ== 0\nYQ==\n", "line 2"),
        ("tiktoken", "cl100k_base.tiktoken", b"YQ== 0\n", "single bytes"),
        ("tiktoken", "mine.tiktoken", b"YQ== 0\n", "Write ENCODING:"),
    ],
)
def test_an_unusable_model_is_one_clear_error(
    tmp_path: Path, name: str, file: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        build_tokenizer(TokenizerConfig(type=name, model=str(tmp_path / file)))  # type: ignore[arg-type]
    assert str(tmp_path / file) in str(caught.value)


def test_a_type_without_its_model_is_refused() -> None:
    with pytest.raises(DataError, match="needs a model"):
        build_tokenizer(TokenizerConfig(type="sentencepiece"))


def test_training_is_deterministic_and_reports_held_out_text(
    sentencepiece_models: dict[str, str], tmp_path: Path
) -> None:
    folder = Path(sentencepiece_models["bpe"]).parent
    for kind, model in sentencepiece_models.items():
        again = TrainingSettings(
            (str(folder / "code.txt"),), 600, kind, special_tokens=("<|pad|>",)
        )
        report = train_tokenizer(again, str(tmp_path / "again.model"))
        assert (tmp_path / "again.model").read_bytes() == Path(model).read_bytes()
        assert report["held_out_bytes_a_token"] > 1.5
        assert report["tokenizer"]["vocab_size"] == 600
        assert json.loads((tmp_path / "again.model.json").read_text()) == json.loads(
            json.dumps(report)
        )


def test_the_sample_is_limited_and_spread_over_files(tmp_path: Path) -> None:
    from megatron_completep.preprocess.tokenizer_training import _sample

    for name in "abcd":
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(
                json.dumps({"text": f"{name} {CODE[i : i + 1000]}"}) + "\n"
                for i in range(0, 8000, 10)
            )
        )
    training, held_out = _sample(TrainingSettings((str(tmp_path),), 600, input_megabytes=0.2))
    assert 0.15e6 < sum(map(len, training + held_out)) < 0.25e6
    assert {chunk[0] for chunk in training} >= set("abcd")
    assert len(held_out) >= 1
    assert not set(held_out) & set(training)


def test_a_vocabulary_the_text_cannot_fill_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("few words")
    with pytest.raises(DataError, match="vocabulary of 5000"):
        train_tokenizer(
            TrainingSettings((str(tmp_path / "a.txt"),), 5000), str(tmp_path / "x.model")
        )
    with pytest.raises(DataError, match="258 ids are taken"):
        train_tokenizer(
            TrainingSettings((str(tmp_path / "a.txt"),), 200), str(tmp_path / "x.model")
        )
    assert not list(tmp_path.glob("x.model*"))


def test_tokenizing_imports_no_gpu_library() -> None:
    heavy = {
        "torch",
        "triton",
        "sentencepiece",
        "tokenizers",
        "tiktoken",
        "pyarrow",
        "matplotlib",
        "ray",
    }
    tools = "megatron_completep.tools.preprocess_data, megatron_completep.tools.train_tokenizer"
    program = f"import sys, {tools}; print({heavy} & sys.modules.keys())"
    root = Path(__file__).parents[2]
    assert (
        subprocess.run(
            [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )
