"""SentencePiece tokenizers from raw text, lossless: decode(encode(text)) == text, byte for byte, for every text.

What that takes: identity normalization, whitespace kept, no dummy prefix, byte fallback (SentencePiece's defaults break the first three),
and `data.tokenizer` for the one character that SentencePiece itself confuses with a space. The end-of-document token is a control
symbol, so no text can produce it.
"""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from megatron_completep.data.files import printable
from megatron_completep.data.tokenizer import SPACE_MARK, SentencePieceTokenizer, Tokenizer
from megatron_completep.errors import DataError
from megatron_completep.preprocess.readers import Document, describe_place, read_documents
from megatron_completep.preprocess.sources import (
    STANDARD_INPUT,
    Block,
    Unit,
    blocks_of,
    find_sources,
    make_units,
)

MODEL_TYPES = ("bpe", "unigram")
END_OF_DOCUMENT = "<|endoftext|>"
_CHUNK_CHARACTERS = 2000  # about what SentencePiece sees at a time: whole lines, so that pieces may cross the ends of lines
_SPREAD_BYTES = 1 << 18  # small files are sampled in groups of this size
_HELD_OUT_EVERY = 50  # one chunk in so many is kept from training


@dataclass(frozen=True)
class TrainingSettings:
    """input_megabytes: text to sample, spread over the files in proportion to their sizes, each from its beginning."""

    inputs: tuple[str, ...]
    vocab_size: int
    model_type: str = "bpe"
    input_megabytes: float = 50.0
    special_tokens: tuple[str, ...] = ()
    character_coverage: float = 0.9999
    json_keys: tuple[str, ...] = ("text",)
    input_format: str = "auto"
    unicode: str = "repair"


def train_tokenizer(
    settings: TrainingSettings,
    output: str,
    say: Callable[[str], None] = lambda text: None,
    standard_input: BinaryIO | None = None,
) -> dict[str, Any]:
    """Train and write `output` (a SentencePiece .model file) and its report `output`.json; returns the report.

    standard_input: what the input `-` stands for; it is read once, into a temporary file.
    The model's bytes depend on the inputs and settings alone. Ids: 0 <unk> (never produced), 1 end of document, then special_tokens,
    the 256 bytes, and the learned pieces. Raises DataError for unusable inputs and for a vocabulary that the text cannot fill.
    """
    if settings.model_type not in MODEL_TYPES:
        raise DataError(
            f"model type = {settings.model_type!r} is unknown. Use one of: {', '.join(MODEL_TYPES)}."
        )
    fixed = 2 + len(settings.special_tokens) + 256
    if settings.vocab_size <= fixed:
        raise DataError(
            f"vocab size = {settings.vocab_size}: {fixed} ids are taken by bytes and special tokens. Use more, such as 4096."
        )
    say(f"reading up to {settings.input_megabytes:g} MB of text")
    with _standard_input_as_file(settings, standard_input) as readable:
        training, held_out = _sample(readable, say)
    size = sum(len(chunk.encode()) for chunk in training)
    say(f"training {settings.model_type}, vocabulary {settings.vocab_size}, on {size / 1e6:.1f} MB")
    model = _train(settings, training)
    _write(output, model)
    tokenizer = SentencePieceTokenizer(output)
    report = {
        "settings": {**asdict(settings), "inputs": [printable(name) for name in settings.inputs]},
        "training_bytes": size,
        "held_out_bytes": sum(len(chunk.encode()) for chunk in held_out),
        "held_out_bytes_a_token": measure_bytes_a_token(tokenizer, held_out),
        "tokenizer": tokenizer.identity(),
    }
    _write(output + ".json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def measure_bytes_a_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float | None:
    """UTF-8 bytes that a token stands for, on average. Raises DataError when a text does not survive encoding and decoding."""
    number = sum(len(text.encode()) for text in texts)
    tokens = 0
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        tokens += len(ids)
        if tokenizer.decode(ids.tolist()) != text:
            raise DataError(f"the tokenizer is not lossless: it changes {text[:80]!r}.")
    return number / tokens if tokens else None


@contextmanager
def _standard_input_as_file(
    settings: TrainingSettings, standard_input: BinaryIO | None
) -> Iterator[TrainingSettings]:
    """The settings, with a file in place of standard input. Raises DataError where nothing says what format that has."""
    if STANDARD_INPUT not in settings.inputs or standard_input is None:
        yield settings
        return
    if settings.input_format == "auto":
        raise DataError(
            "--input -: standard input has no name that shows its format. Give --input-format jsonl, lines or text."
        )
    with tempfile.NamedTemporaryFile(prefix="standard_input.") as file:
        shutil.copyfileobj(standard_input, file)
        file.flush()
        yield replace(
            settings,
            inputs=tuple(file.name if name == STANDARD_INPUT else name for name in settings.inputs),
        )


def _sample(
    settings: TrainingSettings, say: Callable[[str], None] = lambda text: None
) -> tuple[list[str], list[str]]:
    """Chunks for training and chunks held out."""
    sources = find_sources(settings.inputs, settings.input_format)
    if empty := [printable(source.path) for source in sources if not source.size]:
        say(
            f"{len(empty)} input files are empty: {', '.join(empty[:10])}{' ...' if len(empty) > 10 else ''}"
        )
    units = make_units(sources, _SPREAD_BYTES)
    share = min(
        1.0, settings.input_megabytes * 1e6 / max(sum(source.size for source in sources), 1)
    )
    training: list[str] = []
    held_out: list[str] = []
    bad: list[str] = []
    number = 0
    for unit in units:
        budget = share * sum(source.size for source in unit.sources)
        for chunk in _chunks(_texts(unit, settings, budget, bad)):
            (held_out if number % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1 else training).append(
                chunk
            )
            number += 1
    if bad:
        say(f"{len(bad)} documents could not be read and are left out, the first one: {bad[0]}")
    if not training:
        raise DataError(
            f"no text in {len(sources)} input files. Name other files, or check --json-keys."
        )
    return training, held_out or training[:1]


def _texts(unit: Unit, settings: TrainingSettings, budget: float, bad: list[str]) -> Iterator[str]:
    """Texts from the beginning of a unit, about `budget` bytes of them; documents that cannot be read go to `bad`, as a sentence."""
    used = 0
    for block in blocks_of(unit, _SPREAD_BYTES):
        for document in _readable(block, settings, bad):
            for text in document.texts:
                if used >= budget:
                    return
                text = text[: max(int(budget) - used, 1)]
                used += len(text)
                yield text


def _readable(block: Block, settings: TrainingSettings, bad: list[str]) -> Iterator[Document]:
    try:
        for document in read_documents(block, settings.json_keys, settings.unicode):
            if isinstance(document, Document):
                yield document
            else:
                bad.append(f"{describe_place(block, document.place)}: {document.reason}")
    except DataError as error:  # the rest of a damaged file
        bad.append(str(error))


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Runs of whole lines of about _CHUNK_CHARACTERS; a longer line is cut."""
    for text in texts:
        start = 0
        while start < len(text):
            end = text.rfind("\n", start, start + _CHUNK_CHARACTERS) + 1
            if end <= start:
                end = min(start + _CHUNK_CHARACTERS, len(text))
            elif len(text) - start <= _CHUNK_CHARACTERS:
                end = len(text)
            yield text[start:end]
            start = end


def _train(settings: TrainingSettings, chunks: Sequence[str]) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # The trainer takes NUL for a broken file and the mark for a space; both are encoded as bytes later.
            sentence_iterator=(chunk.replace(SPACE_MARK, "").replace("\0", "") for chunk in chunks),
            model_writer=model,
            vocab_size=settings.vocab_size,
            model_type=settings.model_type,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            character_coverage=settings.character_coverage,
            max_sentence_length=1 << 20,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_DOCUMENT,
            control_symbols=list(settings.special_tokens),
            num_threads=16,  # fixed: sums of unigram training depend on it
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"SentencePiece cannot train a vocabulary of {settings.vocab_size} on this text: {error}. Give more text, or a smaller one."
        ) from error
    return model.getvalue()


def _write(path: str, content: bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(path + ".partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)
