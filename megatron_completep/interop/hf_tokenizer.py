"""Any of our tokenizers as Hugging Face's tokenizer.json, which encodes identically or is refused.

SentencePiece writes a space as U+2581. tokenizer.json gets the pieces with a real space instead: no
normalizer is needed then, and the character U+2581 in a text falls back to its bytes, as in
`data.tokenizer`. Where the model puts a space in front of a text, pieces and marks stay as they
are, as in transformers' own Llama tokenizer.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_completep.config.json_text import MAX_BYTES, read_bounded
from megatron_completep.config.schema import TokenizerConfig
from megatron_completep.data.tiktoken_tokenizer import TIKTOKEN_ENCODINGS
from megatron_completep.data.tokenizer import (
    SPACE_MARK,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)
from megatron_completep.errors import ConfigError, DataError
from megatron_completep.interop.model_folder import ModelFolder
from megatron_completep.interop.probes import PROBES as PROBES  # from here for other rooms
from megatron_completep.interop.probes import probe_texts

END_OF_DOCUMENT = "<|endoftext|>"
# Files that lie beside tokenizer.json in Hugging Face folders.
COMPANIONS = ("special_tokens_map.json", "chat_template.jinja")
_TEXTS_AT_ONCE = 4096
_REMEDY = "Export without a tokenizer (--tokenizer-model none), and encode with megatron-completep."


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, seq_length: int, settings: TokenizerConfig
) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`.

    A text begins in them as in training. A SentencePiece model lies beside them, for programs that
    read it instead (llama.cpp). Raises DataError where Hugging Face's format has no equal.
    """
    configuration: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # their names in a text stay text, as in training
    }
    if tokenizer.type == "huggingface":
        model = Path(str(settings.model))
        source = model / "tokenizer.json" if model.is_dir() else model
        configuration = _copy_files(tokenizer, source, folder, configuration)
        end = _name_of(source, tokenizer.eod_id)
        begin = _name_of(source, tokenizer.bos_id)
        # The original's own names are kept, and with them a beginning that it does not have.
        named_end = configuration.get("eos_token")
        if named_end:
            end = None
            begin = None if configuration.get("bos_token") else begin
    else:
        fast, end = to_fast_tokenizer(tokenizer)
        verify(tokenizer, fast)
        begin = None if tokenizer.bos_id is None else fast.id_to_token(tokenizer.bos_id)
        _begin_texts(fast, tokenizer)
        fast.save(str(folder / "tokenizer.json"))
        if isinstance(tokenizer, SentencePieceTokenizer):
            (folder / "tokenizer.model").write_bytes(tokenizer.content)

    if begin is not None:
        configuration["bos_token"] = begin
    if end is not None:
        # A document without a beginning of its own follows the end of the one before.
        configuration |= {"bos_token": begin or end, "eos_token": end}
        # The original's own pad token stays.
        configuration["pad_token"] = configuration.get("pad_token") or end
    encoded = json.dumps(configuration, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(encoded, encoding="utf-8")


def _begin_texts(fast: Any, tokenizer: Tokenizer) -> None:
    """Let a fast tokenizer put in front of a text what training put there, and nothing behind."""
    tokenizers = _library()
    names = [(fast.id_to_token(index), index) for index in tokenizer.beginning]
    if not names:
        # Not none at all: transformers would fill it in by itself.
        single = "$A:0"
        pair = "$A:0 $B:1"
    else:
        front = " ".join(f"{name}:0" for name, _ in names)
        single = f"{front} $A:0"
        pair = f"{single} {front.replace(':0', ':1')} $B:1"
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=names
    )


def _copy_files(
    tokenizer: Tokenizer, source: Path, folder: Path, default: dict[str, Any]
) -> dict[str, Any]:
    """Copy a Hugging Face tokenizer.json and its companions; returns its tokenizer_config.json.

    `default` stands in for a tokenizer_config.json that does not exist. The file is written anew
    only where it begins or ends texts otherwise than training did.
    """
    files = ModelFolder(source.parent)
    configuration = default
    if files.has("tokenizer_config.json"):
        configuration = files.json_object("tokenizer_config.json")
    content = source.read_bytes()
    fast = _library().Tokenizer.from_buffer(content)
    probe = "a"
    plain = fast.encode(probe, add_special_tokens=False).ids
    if fast.encode(probe, add_special_tokens=True).ids != [*tokenizer.beginning, *plain]:
        _begin_texts(fast, tokenizer)
        content = fast.to_str(pretty=True).encode()
        # Some versions of transformers would put the template back by these.
        for name in ("add_bos_token", "add_eos_token"):
            configuration.pop(name, None)
        if tokenizer.beginning:
            configuration["add_bos_token"] = True
    (folder / "tokenizer.json").write_bytes(content)
    # auto_map names Python code of the original's folder, which is not copied.
    if configuration.pop("auto_map", None):
        configuration["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in COMPANIONS:
        if files.has(name):
            (folder / name).write_bytes(read_bounded(files.path(name), MAX_BYTES))
    return configuration


def _name_of(path: Path, token_id: int | None) -> str | None:
    """The token of an id in a tokenizer.json, added tokens included."""
    tokenizers = _library()
    fast = tokenizers.Tokenizer.from_file(str(path))
    vocabulary: dict[str, int] = fast.get_vocab(with_added_tokens=True)
    return next((name for name, i in vocabulary.items() if i == token_id), None)


def to_fast_tokenizer(tokenizer: Tokenizer) -> tuple[Any, str | None]:
    """(a `tokenizers.Tokenizer` with the same ids, the name of its end-of-document token)."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _from_sentencepiece(tokenizer)
    if isinstance(tokenizer, TiktokenTokenizer):
        return _from_tiktoken(tokenizer)
    assert tokenizer.type == "bytes", tokenizer.type
    # The family of bytes: id = byte, no merges, and one special token.
    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
    return _byte_level(vocabulary, [], {END_OF_DOCUMENT: 256}), END_OF_DOCUMENT


def verify(tokenizer: Tokenizer, fast: Any, texts: Iterable[str] = ()) -> None:
    """Encode the texts of `probes`, and `texts`, with both.

    Raises DataError with the first that differs.
    """
    fast.encode_special_tokens = True  # their names in a text are text
    for batch in _batches((*probe_texts(tokenizer), *texts)):
        encodings = fast.encode_batch(list(batch), add_special_tokens=False)
        for probe, encoding, ids in zip(
            batch, encodings, tokenizer.encode_batch(batch), strict=True
        ):
            expected = ids.tolist()
            if encoding.ids != expected:
                raise DataError(_unlike(probe, encoding.ids, expected))
    fast.encode_special_tokens = False


def _batches(texts: Iterable[str]) -> Iterator[Sequence[str]]:
    remaining = iter(texts)
    while batch := list(islice(remaining, _TEXTS_AT_ONCE)):
        yield batch


def _unlike(probe: str, ids: list[int], expected: list[int]) -> str:
    """The message about a text that is not encoded alike, from the first id that differs."""
    place = 0
    while ids[: place + 1] == expected[: place + 1]:
        place += 1
    first = max(0, place - 3)
    return (
        f"the tokenizer turned into tokenizer.json does not encode {probe[:60]!r} alike: from "
        f"token {first} on {ids[first : first + 12]} instead of {expected[first : first + 12]}. "
        f"{_REMEDY}"
    )


def _library() -> Any:
    """The package `tokenizers`. Raises ConfigError where it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(
            "the package tokenizers is not installed. pip install 'megatron-completep[hf]'."
        ) from None
    return tokenizers


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> tuple[Any, str | None]:
    """As `to_fast_tokenizer`. Raises DataError with every setting that has no equal."""
    tokenizers = _library()
    # The processor does not tell all settings of its model; the stored message does. The module
    # makes its classes when it is imported, so that they have no types.
    messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto = messages.ModelProto()
    proto.ParseFromString(tokenizer._processor.serialized_model_proto())
    kinds = type(proto).SentencePiece
    ids_by_kind: dict[int, list[int]] = {}
    names = []
    for token_id, entry in enumerate(proto.pieces):
        ids_by_kind.setdefault(entry.type, []).append(token_id)
        is_text = entry.type == kinds.NORMAL
        has_space = is_text and not proto.normalizer_spec.add_dummy_prefix
        names.append(entry.piece.replace(SPACE_MARK, " ") if has_space else entry.piece)

    reasons = _sentencepiece_blockers(proto, ids_by_kind)
    if reasons:
        raise DataError(
            f"the SentencePiece model {tokenizer.model_name} has no equal as tokenizer.json: "
            f"{'; '.join(reasons)}. tools/train_tokenizer.py makes models that have one. {_REMEDY}"
        )
    scores = [entry.score for entry in proto.pieces]
    normal_ids = ids_by_kind[kinds.NORMAL]
    if proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        model = _bpe(names, scores, normal_ids)
    else:
        model = _unigram(names, scores, normal_ids, ids_by_kind[kinds.UNKNOWN][0])

    # Bytes become characters first, then the pieces are joined as they are.
    fast = tokenizers.Tokenizer(model)
    decoders = tokenizers.decoders
    steps = [decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        marked = tokenizers.normalizers.Replace(" ", SPACE_MARK)
        prefix = tokenizers.normalizers.Prepend(SPACE_MARK)
        fast.normalizer = tokenizers.normalizers.Sequence([prefix, marked])
        steps = [decoders.Replace(SPACE_MARK, " "), *steps, decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(steps)
    special_ids = ids_by_kind.get(kinds.UNKNOWN, []) + ids_by_kind.get(kinds.CONTROL, [])
    _add_special_tokens(fast, [names[token_id] for token_id in special_ids])
    end = names[tokenizer.eod_id] if tokenizer.eod_id is not None else None
    return fast, end


def _sentencepiece_blockers(proto: Any, ids_by_kind: dict[int, list[int]]) -> list[str]:
    """Every reason why a model has no equal as tokenizer.json; empty where it has one."""
    trainer = proto.trainer_spec
    normalizer = proto.normalizer_spec
    kinds = type(proto).SentencePiece
    byte_ids = ids_by_kind.get(kinds.BYTE, [])
    is_supported = trainer.model_type in (trainer.BPE, trainer.UNIGRAM)
    is_identity = normalizer.name == "identity" and not normalizer.precompiled_charsmap
    removes_whitespace = normalizer.remove_extra_whitespaces
    has_every_byte = trainer.byte_fallback and len(byte_ids) == 256
    other_symbols = ids_by_kind.get(kinds.USER_DEFINED) or ids_by_kind.get(kinds.UNUSED)

    # Conversion leaves out what a normalizer would do, so a model must not need one. The byte
    # fallback of `tokenizers` needs a piece for every byte, or text would become unknown.
    checks = (
        (not is_supported, "its model is neither bpe nor unigram"),
        (not is_identity, f"it normalizes text ({normalizer.name})"),
        (removes_whitespace, "it removes whitespace (remove_extra_whitespaces)"),
        (not has_every_byte, "it has no byte fallback"),
        (trainer.treat_whitespace_as_suffix, "it treats whitespace as a suffix"),
        (not normalizer.escape_whitespaces, "it does not mark spaces"),
        (bool(other_symbols), "it has symbols of the user's or unused ones"),
    )
    return [reason for applies, reason in checks if applies]


def _bpe(names: list[str], scores: list[float], normal_ids: list[int]) -> Any:
    """A BPE model with the merges that SentencePiece makes.

    SentencePiece joins the neighbours whose union has the best score, so every way to cut a piece
    in two pieces is a merge, with the rank of the union's score.
    """
    tokenizers = _library()
    normal_names = {names[token_id] for token_id in normal_ids}
    merges = []
    for token_id in sorted(normal_ids, key=lambda token_id: -scores[token_id]):
        name = names[token_id]
        for position in range(1, len(name)):
            head = name[:position]
            tail = name[position:]
            if head in normal_names and tail in normal_names:
                merges.append((head, tail))
    vocabulary = {name: token_id for token_id, name in enumerate(names)}
    return tokenizers.models.BPE(
        vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=False
    )


def _unigram(names: list[str], scores: list[float], normal_ids: list[int], unknown_id: int) -> Any:
    """A unigram model in which text that spells a byte piece or a special token does not match it.

    Such pieces get scores below those of any other segmentation.
    """
    tokenizers = _library()
    lowest = min(scores[token_id] for token_id in normal_ids)
    is_normal = set(normal_ids)
    rows = []
    for token_id, (name, score) in enumerate(zip(names, scores, strict=True)):
        # Below the sum of one worst piece a character, with a margin for unknown characters.
        out_of_reach = (len(name) + 1) * (lowest - 20.0)
        rows.append((name, score if token_id in is_normal else out_of_reach))
    return tokenizers.models.Unigram(rows, unk_id=unknown_id, byte_fallback=True)


def _from_tiktoken(tokenizer: TiktokenTokenizer) -> tuple[Any, str | None]:
    """As `to_fast_tokenizer`: tiktoken's ranks of tokens become merges of two tokens.

    tiktoken joins the neighbours whose union has the lowest rank, however the two came about. So
    every way to cut a token in two tokens is a merge, with the rank of the token.
    """
    encoding = tokenizer._encoding
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ranks: dict[bytes, int] = encoding._mergeable_ranks
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        cuts = [(token[:position], token[position:]) for position in range(1, len(token))]
        pairs = [(head, tail) for head, tail in cuts if head in ranks and tail in ranks]
        # The parts that are made first come first.
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        # No merge leads to other tokens: only a whole word matches them, which ignore_merges finds.
        merges += [(spell(head), spell(tail)) for head, tail in pairs]

    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    special = dict(encoding._special_tokens)
    fast = _byte_level(vocabulary, merges, special, _pattern(encoding))
    end = next((name for name, i in special.items() if i == tokenizer.eod_id), None)
    return fast, end


def _pattern(encoding: Any) -> str:
    """The splitting pattern in the dialect of `tokenizers`.

    Newer versions of tiktoken write the patterns of known encodings with possessive repetitions,
    of which `tokenizers` takes `{1,3}+` for another thing. Raises DataError for one of those in an
    encoding that is not known.
    """
    if encoding.name in TIKTOKEN_ENCODINGS:
        return TIKTOKEN_ENCODINGS[encoding.name][0]
    pattern: str = encoding._pat_str
    if "}+" in pattern:
        raise DataError(
            f"tiktoken encoding {encoding.name}: its pattern has a possessive {{...}}+, which "
            f"tokenizer.json cannot express. {_REMEDY}"
        )
    return pattern


def _byte_level(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    special: dict[str, int],
    pattern: str | None = None,
) -> Any:
    """Byte-level BPE; without a pattern a text is not split into words."""
    tokenizers = _library()
    model = tokenizers.models.BPE(
        vocab=vocabulary | special, merges=merges, ignore_merges=pattern is not None
    )
    fast = tokenizers.Tokenizer(model)
    pre_tokenizers = tokenizers.pre_tokenizers
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        fast.pre_tokenizer = bytes_only
    else:
        regex = tokenizers.Regex(pattern)
        split = pre_tokenizers.Split(regex, behavior="isolated", invert=False)
        fast.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    fast.decoder = tokenizers.decoders.ByteLevel()
    _add_special_tokens(fast, special)
    return fast


def _add_special_tokens(fast: Any, names: Iterable[str]) -> None:
    """Mark tokens of the vocabulary as special: text never produces them."""
    tokenizers = _library()
    added = [tokenizers.AddedToken(name, normalized=False, special=True) for name in names]
    fast.add_special_tokens(added)


def _byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte (GPT-2's choice).

    Printable characters of Latin-1 stand for themselves, the other bytes take letters from U+0100
    on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]
