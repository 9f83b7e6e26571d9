"""Any of our tokenizers as Hugging Face's tokenizer.json, which encodes identically or is refused.

SentencePiece: pieces are stored with a real space where SentencePiece writes U+2581. No normalizer is needed then, and that character
in a text falls back to its bytes, as in `data.tokenizer`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_completep.config.json_text import MAX_BYTES, read_bounded
from megatron_completep.config.schema import TokenizerConfig
from megatron_completep.data.tokenizer import (
    SPACE_MARK,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)
from megatron_completep.errors import ConfigError, DataError
from megatron_completep.interop.model_folder import ModelFolder

END_OF_DOCUMENT = "<|endoftext|>"
COMPANIONS = (
    "special_tokens_map.json",
    "chat_template.jinja",
)  # of tokenizer.json, in Hugging Face folders
_REMEDY = "Export without a tokenizer (--tokenizer-model none), and encode with megatron-completep."

# Scripts, combining marks, emoji sequences, whitespace of all kinds, code, and names of special tokens as text.
PROBES = (
    "The quick brown fox jumps over the lazy dog. It's 3,141,592 o'clock; we'll see!",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. ÄÖÜ ß € — „Anführung“",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Ελληνικά: ξεσκεπάζω την ψυχοφθόρα.",
    "敏捷的棕色狐狸跳过了懒狗。いろはにほへと ちりぬるを。키스의 고유조건은 입술끼리 만나야 하고",
    "نص حكيم له سر قاطع وذو شأن عظيم  דג סקרן שט בים מאוכזב  ऋषियों को सताने वाले दुष्ट राक्षसों",
    "e\u0301 \u00e9 a\u0308 \ufb01 \u212b \u1e9b\u0323 👩‍👩‍👧‍👦 🇩🇪 👍🏽 \U0001f600\ufe0f \u200b\u200d\ufeff",
    "def f(x):\n\tif x:\n        return {'a': [1, 2], \"b\": None}  # ▁ and ▁▁\r\n\n\n    \t \n",
    " leading", "trailing ", "  two  ", "\n", "", " ", "        ", "\t\t\t", "a" * 50, " " * 33 + "x", "\u00a0\u3000\u2003 x",
    "<|endoftext|> <s></s> <unk> <0x0A> <0x41> [EOS] <|im_start|>", "\0 \x07 \x1b[0m \x7f", SPACE_MARK, f"a{SPACE_MARK}b {SPACE_MARK}",
)  # fmt: skip


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, seq_length: int, settings: TokenizerConfig
) -> None:
    """Write tokenizer.json and tokenizer_config.json. Raises DataError where Hugging Face's format has no equal."""
    configuration: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # their names in a text stay text, as in training
    }
    if tokenizer.type == "huggingface":
        source = Path(str(settings.model))
        path = source / "tokenizer.json" if source.is_dir() else source
        files = ModelFolder(path.parent)
        (folder / "tokenizer.json").write_bytes(path.read_bytes())
        if files.has("tokenizer_config.json"):
            configuration = files.json_object("tokenizer_config.json")
        if configuration.pop("auto_map", None):  # no code comes along
            configuration["tokenizer_class"] = "PreTrainedTokenizerFast"
        for name in COMPANIONS:
            if files.has(name):
                (folder / name).write_bytes(read_bounded(files.path(name), MAX_BYTES))
        end = next((n for n, i in _vocabulary(path).items() if i == tokenizer.eod_id), None)
        if end is not None and not configuration.get("eos_token"):
            configuration |= {"bos_token": end, "eos_token": end, "pad_token": end}
    else:
        fast, end = to_fast_tokenizer(tokenizer)
        verify(tokenizer, fast)
        fast.save(str(folder / "tokenizer.json"))
        if end is not None:
            configuration |= {"bos_token": end, "eos_token": end, "pad_token": end}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(configuration, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def to_fast_tokenizer(tokenizer: Tokenizer) -> tuple[Any, str | None]:
    """(a `tokenizers.Tokenizer` with the same ids, the name of its end-of-document token)."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _from_sentencepiece(tokenizer)
    if isinstance(tokenizer, TiktokenTokenizer):
        return _from_tiktoken(tokenizer)
    assert tokenizer.type == "bytes", tokenizer.type
    letters = _byte_letters()
    return _byte_level(
        {letters[byte]: byte for byte in range(256)}, [], {END_OF_DOCUMENT: 256}
    ), END_OF_DOCUMENT


def verify(tokenizer: Tokenizer, fast: Any, texts: Iterable[str] = ()) -> None:
    """Encode many texts with both; DataError with the first that differs."""
    fast.encode_special_tokens = True
    for text in (*PROBES, *_mixtures(), *texts):
        expected, found = tokenizer.encode(text), fast.encode(text, add_special_tokens=False).ids
        if expected != found:
            raise DataError(
                f"the tokenizer turned into tokenizer.json does not encode {text[:60]!r} alike: {found[:12]} instead of {expected[:12]}. "
                f"{_REMEDY}"
            )
    fast.encode_special_tokens = False


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(
            "the package tokenizers is not installed. pip install 'megatron-completep[hf]'."
        ) from None
    return tokenizers


def _mixtures() -> list[str]:
    """Random mixtures of the probes' characters, runs of one character among them: where ties between segmentations show."""
    generator = random.Random(0)
    characters = sorted(set("".join(PROBES)))
    texts = []
    for length in (3, 7, 20, 60):
        for _ in range(40):
            runs = [
                generator.choice(characters) * generator.choice((1, 1, 1, 2, 5))
                for _ in range(length)
            ]
            texts.append("".join(runs))
    words = " ".join(PROBES).split(" ")
    texts += [" ".join(generator.choice(words) for _ in range(30)) for _ in range(40)]
    for space in (" ", "\t", "-", "="):  # long texts: their sums round
        texts += [
            "\n".join(space * n + generator.choice(words) for n in range(start, 64))
            for start in range(4)
        ]
    return texts


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> tuple[Any, str | None]:
    tokenizers = _library()
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when imported
    proto.ParseFromString(tokenizer._processor.serialized_model_proto())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = type(proto).SentencePiece
    by_kind: dict[int, list[int]] = {}
    for index, piece in enumerate(proto.pieces):
        by_kind.setdefault(piece.type, []).append(index)
    problems = {
        "its model is neither bpe nor unigram": trainer.model_type
        not in (trainer.BPE, trainer.UNIGRAM),
        f"it normalizes text ({normalizer.name})": normalizer.name != "identity"
        or bool(normalizer.precompiled_charsmap),
        "it puts a space in front (add_dummy_prefix)": normalizer.add_dummy_prefix,
        "it removes whitespace (remove_extra_whitespaces)": normalizer.remove_extra_whitespaces,
        "it has no byte fallback": not trainer.byte_fallback
        or len(by_kind.get(kinds.BYTE, [])) != 256,
        "it treats whitespace as a suffix": trainer.treat_whitespace_as_suffix,
        "it does not mark spaces": not normalizer.escape_whitespaces,
        "it has symbols of the user's or unused ones": bool(
            by_kind.get(kinds.USER_DEFINED) or by_kind.get(kinds.UNUSED)
        ),
    }
    found = [problem for problem, there in problems.items() if there]
    if found:
        raise DataError(
            f"the SentencePiece model {tokenizer.model_name} has no equal as tokenizer.json: {'; '.join(found)}. "
            f"tools/train_tokenizer.py makes models that have one. {_REMEDY}"
        )
    names = [
        piece.piece.replace(SPACE_MARK, " ") if piece.type == kinds.NORMAL else piece.piece
        for piece in proto.pieces
    ]
    scores = [piece.score for piece in proto.pieces]
    normal = by_kind[kinds.NORMAL]
    if trainer.model_type == trainer.BPE:
        model = _bpe(names, scores, normal)
    else:
        model = _unigram(names, scores, normal, by_kind[kinds.UNKNOWN][0])
    fast = tokenizers.Tokenizer(model)
    fast.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    special = [names[i] for kind in (kinds.UNKNOWN, kinds.CONTROL) for i in by_kind.get(kind, [])]
    fast.add_special_tokens(
        [tokenizers.AddedToken(name, normalized=False, special=True) for name in special]
    )
    return fast, names[tokenizer.eod_id] if tokenizer.eod_id is not None else None


def _bpe(names: list[str], scores: list[float], normal: list[int]) -> Any:
    """SentencePiece joins the neighbours whose union has the best score; every way to cut a piece in two is such a join."""
    tokenizers = _library()
    known = {names[i] for i in normal}
    merges = []
    for i in sorted(normal, key=lambda i: -scores[i]):
        name = names[i]
        cuts = [(name[:at], name[at:]) for at in range(1, len(name))]
        merges += [(left, right) for left, right in cuts if left in known and right in known]
    vocabulary = {name: i for i, name in enumerate(names)}
    return tokenizers.models.BPE(
        vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=False
    )


def _unigram(names: list[str], scores: list[float], normal: list[int], unknown: int) -> Any:
    """Text that spells a byte piece or a special token must not match it: these get scores below any other way through."""
    tokenizers = _library()
    lowest = min(scores[i] for i in normal)
    inside = set(normal)
    rows = [
        (name, score if i in inside else (len(name) + 1) * (lowest - 20.0))
        for i, (name, score) in enumerate(zip(names, scores, strict=True))
    ]
    return tokenizers.models.Unigram(rows, unk_id=unknown, byte_fallback=True)


def _from_tiktoken(tokenizer: TiktokenTokenizer) -> tuple[Any, str | None]:
    encoding = tokenizer._encoding
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ranks: dict[bytes, int] = encoding._mergeable_ranks
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _split_by_ranks(ranks, token, rank)
            if len(parts) == 2:  # others are whole-piece matches only, which ignore_merges finds
                merges.append((spell(parts[0]), spell(parts[1])))
    special = dict(encoding._special_tokens)
    fast = _byte_level(
        {spell(token): rank for token, rank in ranks.items()}, merges, special, encoding._pat_str
    )
    return fast, next((name for name, i in special.items() if i == tokenizer.eod_id), None)


def _split_by_ranks(ranks: dict[bytes, int], token: bytes, below: int) -> list[bytes]:
    """The parts of a token just before the merge that makes it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        pairs = [ranks.get(parts[i] + parts[i + 1], below) for i in range(len(parts) - 1)]
        best = min(pairs)
        if best >= below:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _byte_level(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    special: dict[str, int],
    pattern: str | None = None,
) -> Any:
    """Byte-level BPE; without a pattern the whole text is one piece."""
    tokenizers = _library()
    model = tokenizers.models.BPE(
        vocab=vocabulary | special, merges=merges, ignore_merges=pattern is not None
    )
    fast = tokenizers.Tokenizer(model)
    bytes_only = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        fast.pre_tokenizer = bytes_only
    else:
        split = tokenizers.pre_tokenizers.Split(
            tokenizers.Regex(pattern), behavior="isolated", invert=False
        )
        fast.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytes_only])
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens(
        [tokenizers.AddedToken(name, normalized=False, special=True) for name in special]
    )
    return fast


def _byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte (GPT-2's choice): Latin-1's own, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _vocabulary(path: Path) -> dict[str, int]:
    tokenizers = _library()
    return tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
