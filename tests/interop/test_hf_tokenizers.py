"""Every tokenizer as an exported folder holds it,
opened by transformers, encodes and decodes as ours does in training.
"""

from __future__ import annotations

import base64
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_completep.config.schema import TokenizerConfig
from megatron_completep.data.tokenizer import SPACE_MARK, Tokenizer, build_tokenizer
from megatron_completep.errors import ConfigError, DataError
from megatron_completep.inference.lm_eval_tasks import TaskSettings, evaluate_tasks
from megatron_completep.interop import hf_tokenizer
from megatron_completep.interop.check_export import load_with_transformers
from megatron_completep.interop.export_model import ExportSettings, export_model
from megatron_completep.interop.hf_tokenizer import (
    PROBES,
    to_fast_tokenizer,
    verify,
    write_tokenizer,
)
from megatron_completep.interop.probes import locale_names
from megatron_completep.preprocess.tokenizer_training import TrainingSettings, train_tokenizer
from tests.support.exports import LLAMA, checkpoint

transformers = pytest.importorskip("transformers")

CORPUS = (
    Path(__file__).read_text("utf-8")
    + "\n".join(PROBES).replace("\0", "").replace(SPACE_MARK, "") * 3
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenizerConfig]:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "corpus.txt").write_text(CORPUS, "utf-8")
    for kind in ("bpe", "unigram"):
        train_tokenizer(
            TrainingSettings((str(folder / "corpus.txt"),), 900, kind, special_tokens=("<|pad|>",)),
            str(folder / f"{kind}.model"),
        )
    ranks = [bytes([byte]) for byte in range(256)] + [
        b" t",
        b"th",
        b" th",
        b"he",
        b" the",
        b"    ",
        "ü".encode(),
        b" whole-piece",
    ]
    (folder / "small.tiktoken").write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    )
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    library.train_from_iterator([CORPUS], trainer)
    library.save(str(folder / "tokenizer.json"))
    return {
        "sentencepiece": TokenizerConfig(type="sentencepiece", model=str(folder / "bpe.model")),
        "unigram": TokenizerConfig(type="sentencepiece", model=str(folder / "unigram.model")),
        "gpt2_pattern": TokenizerConfig(type="tiktoken", model=f"gpt2:{folder / 'small.tiktoken'}"),
        "cl100k_pattern": TokenizerConfig(
            type="tiktoken", model=f"cl100k_base:{folder / 'small.tiktoken'}"
        ),
        "o200k_pattern": TokenizerConfig(
            type="tiktoken", model=f"o200k_base:{folder / 'small.tiktoken'}"
        ),
        "huggingface": TokenizerConfig(type="huggingface", model=str(folder / "tokenizer.json")),
        "bytes": TokenizerConfig(type="bytes", model=None),
    }


NAMES = ("sentencepiece", "gpt2_pattern", "cl100k_pattern", "o200k_pattern", "huggingface", "bytes")


def opened(config: TokenizerConfig, folder: Path) -> tuple[Tokenizer, Any]:
    """(ours, what AutoTokenizer makes of the written folder)."""
    ours = build_tokenizer(config)
    write_tokenizer(ours, folder, 96, config)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return ours, transformers.AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("name", NAMES)
def test_transformers_encodes_and_decodes_multilingual_text_as_training_did(
    name: str, models: dict, tmp_path: Path
) -> None:
    ours, theirs = opened(models[name], tmp_path)
    for text in (*PROBES, CORPUS):
        if name == "huggingface" and "<|endoftext|>" in text:
            continue  # its own configuration decides, which here makes it special
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, text[:50]
        assert theirs.decode(ids) == ours.decode(ids), text[:50]
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eod_id
    assert theirs.decode([*ours.encode("end"), ours.eod_id], skip_special_tokens=True) == "end"
    assert len(theirs) == ours.vocab_size


@pytest.fixture(scope="module")
def bpe_pair(models: dict[str, TokenizerConfig]) -> tuple[Tokenizer, Any]:
    ours = build_tokenizer(models["sentencepiece"])
    fast = to_fast_tokenizer(ours)[0]
    fast.encode_special_tokens = True
    return ours, fast


@given(
    st.text(
        st.one_of(st.sampled_from(sorted(set(CORPUS))), st.characters(exclude_categories=["Cs"])),
        max_size=60,
    )
)
@settings(max_examples=300)
@example("aaaa    aaa\t\t\t\n\n\n")
@example(f"{SPACE_MARK}a{SPACE_MARK}{SPACE_MARK} \0")
def test_sentencepiece_and_its_fast_twin_agree_on_any_text(
    bpe_pair: tuple[Tokenizer, Any], text: str
) -> None:
    ours, fast = bpe_pair
    ids = ours.encode(text)
    assert fast.encode(text).ids == ids
    assert fast.decode(ids) == text == ours.decode(ids)


def write_ranks(path: Path, ranks: dict[bytes, int]) -> str:
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    path.write_bytes(b"".join(lines))
    return f"cl100k_base:{path}"


def crossed_ranks() -> dict[bytes, int]:
    """Tokens that are made of tokens with higher ranks, as some of Llama 3's are."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = ["лаг", "фла", "флаг", "аг", "ла", "флага", "агам", "abc", "bc", "ab", "xabc"]
    pieces = [word.encode() for word in words]
    pieces += [" ф".encode(), " флаг".encode()]
    # Cyrillic letters of two bytes come last, so every merge of letters descends first.
    pieces += [letter.encode() for letter in "флагам"]
    for number, piece in enumerate(dict.fromkeys(pieces)):
        ranks[piece] = 256 + number
    return ranks


def test_tokens_that_are_reached_by_merges_of_descending_ranks_are_reached(tmp_path: Path) -> None:
    model = write_ranks(tmp_path / "crossed.tiktoken", crossed_ranks())
    ours = build_tokenizer(TokenizerConfig(type="tiktoken", model=model))
    fast, _ = to_fast_tokenizer(ours)
    generator = random.Random(1)
    words = ["".join(generator.choices("флагамabcx ", k=9)) for _ in range(500)]
    for text in (" флага", "флагам", *words):
        assert fast.encode(text, add_special_tokens=False).ids == ours.encode(text), text
    verify(ours, fast)
    # The control: only those merges whose ranks ascend. The check names a text.
    ranks = crossed_ranks()
    right = json.loads(fast.to_str())
    spelled = dict(right["model"]["vocab"].items())
    merges = right["model"]["merges"]
    right["model"]["merges"] = [
        pair for pair in merges if max(map(spelled.get, pair)) < spelled["".join(pair)]
    ]
    assert len(right["model"]["merges"]) < len(merges) and len(ranks) < len(spelled)
    with pytest.raises(DataError, match="does not encode"):
        verify(ours, tokenizers.Tokenizer.from_str(json.dumps(right)))


def test_a_named_encoding_is_known_by_its_ranks_whatever_the_librarys_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer library writes cl100k_base with possessive repetitions, which `tokenizers` reads
    otherwise: long numbers would be one word.
    """
    import tiktoken

    ranks = crossed_ranks() | {b"12": 290, b"34": 291, b"1234": 292, b"123": 293}
    model = write_ranks(tmp_path / "t.tiktoken", ranks)
    by_file = build_tokenizer(TokenizerConfig(type="tiktoken", model=model))
    pattern = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    )
    named = tiktoken.Encoding(
        "cl100k_base", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: named)
    ours = build_tokenizer(TokenizerConfig(type="tiktoken", model="cl100k_base"))
    assert ours.hash == by_file.hash and ours.former_hashes
    assert all(ours.is_recorded_in({"hash": former}) for former in ours.former_hashes)
    assert not ours.is_recorded_in({"hash": "another"})
    fast, _ = to_fast_tokenizer(ours)
    verify(ours, fast, ["1234512345", "x 123456 y"])
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    with pytest.raises(DataError, match="does not encode"):
        verify(ours, fast, ["1234512345"])


@pytest.fixture(scope="module")
def with_dummy_prefix(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    """A SentencePiece model as Llama 2's: a space in front, byte fallback, nothing normalized."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("dummy")
    (folder / "corpus.txt").write_text(CORPUS, "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "llama"),
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return TokenizerConfig(type="sentencepiece", model=str(folder / "llama.model"))


def test_with_a_dummy_prefix_the_mark_is_the_librarys_and_the_export_agrees(
    with_dummy_prefix: TokenizerConfig, tmp_path: Path
) -> None:
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=with_dummy_prefix.model)
    settings = with_dummy_prefix.model_copy(update={"prepend_bos": True})
    ours, theirs = opened(settings, tmp_path)
    for text in (f"a{SPACE_MARK}b", " a  b", "", "ж", *PROBES):
        ids = ours.encode(text)
        assert ids == library.encode(text), text
        assert ours.decode(ids) == library.decode(ids) == theirs.decode(ids), text
        assert theirs(text)["input_ids"] == [library.bos_id(), *ids], text
    assert ours.decode(ours.encode(f"a{SPACE_MARK}b")) == "a b"  # not "a  b"
    assert (tmp_path / "tokenizer.model").read_bytes() == Path(
        str(with_dummy_prefix.model)
    ).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_real_text_of_many_languages_is_encoded_alike(
    name: str, models: dict[str, TokenizerConfig], tmp_path: Path
) -> None:
    """A tenth of what the slow test reads."""
    compare_on_real_text(models[name], tmp_path, 100_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "with_dummy_prefix"])
def test_a_megabyte_of_many_languages_is_encoded_alike(
    name: str,
    models: dict[str, TokenizerConfig],
    with_dummy_prefix: TokenizerConfig,
    tmp_path: Path,
) -> None:
    settings = models.get(name, with_dummy_prefix)
    compare_on_real_text(settings, tmp_path, 1_000_000)


def compare_on_real_text(settings: TokenizerConfig, folder: Path, size: int) -> None:
    """Ids of transformers and ours on names of languages and territories, `size` bytes of them."""
    pytest.importorskip("babel")
    ours, theirs = opened(settings, folder)
    texts = list(locale_names(None))
    # Every so many texts, so that all languages have their share.
    step = max(1, sum(len(text.encode()) for text in texts) // size)
    chosen = texts[::step]
    assert sum(len(text.encode()) for text in chosen) > 0.8 * size
    encoded = theirs(chosen)["input_ids"]
    for text, ids, expected in zip(chosen, encoded, ours.encode_batch(chosen), strict=True):
        assert ids == expected.tolist(), text[:60]


def test_a_unigram_model_agrees_or_is_refused(models: dict[str, TokenizerConfig]) -> None:
    """Between equally likely segmentations, of runs of one character above all, SentencePiece's
    choice depends on how its float32 sums round; a model for which that shows is refused.
    """
    ours = build_tokenizer(models["unigram"])
    fast = to_fast_tokenizer(ours)[0]
    try:
        verify(ours, fast)
    except DataError as error:
        assert "does not encode" in str(error)
    fast.encode_special_tokens = True
    prose = [text for text in PROBES if len(set(text)) > 10 and "   " not in text]
    assert any("<0x0A>" in text for text in prose)  # names of bytes and special tokens as text
    for text in prose:
        assert fast.encode(text).ids == ours.encode(text), text


def test_a_conversion_that_encodes_otherwise_is_refused(
    models: dict[str, TokenizerConfig], tmp_path: Path, monkeypatch
) -> None:
    """Negative controls: merges in the wrong order, and U+2581 taken for a space."""
    ours = build_tokenizer(models["sentencepiece"])
    right = hf_tokenizer._bpe
    monkeypatch.setattr(
        hf_tokenizer,
        "_bpe",
        lambda names, scores, normal: right(names, [-s for s in scores], normal),
    )
    with pytest.raises(DataError, match="does not encode"):
        write_tokenizer(ours, tmp_path, 96, models["sentencepiece"])
    monkeypatch.undo()
    fast = to_fast_tokenizer(ours)[0]
    fast.normalizer = tokenizers.normalizers.Replace(SPACE_MARK, " ")
    with pytest.raises(DataError, match="does not encode"):
        verify(ours, fast)


def test_sentencepiece_models_that_change_text_are_refused_with_all_reasons(tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "corpus.txt").write_text(CORPUS, "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "stock"),
        vocab_size=300,
        model_type="bpe",
        minloglevel=2,
    )
    ours = build_tokenizer(
        TokenizerConfig(type="sentencepiece", model=str(tmp_path / "stock.model"))
    )
    with pytest.raises(DataError) as error:
        to_fast_tokenizer(ours)
    assert all(
        words in str(error.value) for words in ("nmt_nfkc", "removes whitespace", "byte fallback")
    )


def test_an_exported_folder_holds_the_tokenizer_and_its_end_of_document(
    models: dict[str, TokenizerConfig], tmp_path: Path
) -> None:
    run = checkpoint(
        tmp_path / "run",
        data={"train": [{"prefix": "none"}], "tokenizer": models["bytes"].model_dump()},
        **{**LLAMA, "vocab_size": 260},
    )
    report = export_model(run, tmp_path / "out")
    assert report.tokenizer == "bytes"
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert theirs("zwölf")["input_ids"] == list("zwölf".encode())
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"] == 256
    without = export_model(run, tmp_path / "without", ExportSettings(tokenizer="none"))
    assert without.tokenizer is None and not (tmp_path / "without" / "tokenizer.json").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(
    models: dict[str, TokenizerConfig], tmp_path: Path
) -> None:
    data = {"train": [{"prefix": "none"}], "tokenizer": models["bytes"].model_dump()}
    run = checkpoint(tmp_path / "run", data=data, **LLAMA)
    with pytest.raises(DataError, match=r"257 ids, model\.vocab_size = 93"):
        export_model(run, tmp_path / "out")
    plain = checkpoint(tmp_path / "plain", **LLAMA)
    with pytest.raises(ConfigError, match=r"no data\.tokenizer"):
        export_model(plain, tmp_path / "out", ExportSettings(tokenizer="somewhere.model"))


@pytest.mark.parametrize(
    ("package", "action"),
    [
        (
            "tokenizers",
            lambda: to_fast_tokenizer(build_tokenizer(TokenizerConfig(type="bytes", model=None))),
        ),
        ("transformers", lambda: load_with_transformers("nowhere")),
        ("lm_eval", lambda: evaluate_tasks(None, TaskSettings(("any",)))),  # type: ignore[arg-type]
    ],
)
def test_a_package_that_is_not_installed_is_named_with_the_extra_that_brings_it(
    package: str, action, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ConfigError, match=r"is not installed. pip install 'megatron-completep\[(hf|eval)\]'"
    ):
        action()
