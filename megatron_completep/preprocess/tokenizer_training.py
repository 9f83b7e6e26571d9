"""Lossless SentencePiece tokenizers from raw text: decode(encode(text)) == text for every text.

What that takes: identity normalization, whitespace kept, no dummy prefix, byte fallback
(SentencePiece's defaults break the first three), and `data.tokenizer` for the one character that
SentencePiece itself confuses with a space. The end-of-document token is a control symbol, so no
text can produce it.
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
    Source,
    Unit,
    blocks_of,
    find_sources,
    make_units,
)

MODEL_TYPES = ("bpe", "unigram")
END_OF_DOCUMENT = "<|endoftext|>"
# About what SentencePiece sees at a time: whole lines, so that pieces may cross the ends of lines.
_CHUNK_CHARACTERS = 2000
_SPREAD_BYTES = 1 << 18  # small files are sampled in groups of this size
_HELD_OUT_EVERY = 50  # one chunk in so many is kept from training
_LISTED_FILES = 10  # in one message


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that decides the model, except the contents of the inputs.

    input_megabytes: text to sample, spread over the files in proportion to their sizes, each from
    its beginning.
    """

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
    """Train and write `output` (a SentencePiece .model file) and its report `output`.json.

    Returns the report. standard_input: what the input `-` stands for; it is read once, into a
    temporary file. The model's bytes depend on the inputs and settings alone. Ids: 0 <unk> (never
    produced), 1 end of document, then special_tokens, the 256 bytes, and the learned pieces. Raises
    DataError for unusable inputs and for a vocabulary that the text cannot fill.
    """
    _check_settings(settings)
    say(f"reading up to {settings.input_megabytes:g} MB of text")
    with _standard_input_as_file(settings, standard_input) as readable:
        training, held_out = _sample(readable, say)
    size = _utf8_size(training)
    say(f"training {settings.model_type}, vocabulary {settings.vocab_size}, on {size / 1e6:.1f} MB")
    model = _train(settings, training)
    _write(output, model)

    # The report is of the file as a run will read it.
    tokenizer = SentencePieceTokenizer(output)
    reported_settings = asdict(settings)
    reported_settings["inputs"] = [printable(name) for name in settings.inputs]
    report = {
        "settings": reported_settings,
        "training_bytes": size,
        "held_out_bytes": _utf8_size(held_out),
        "held_out_bytes_a_token": measure_bytes_a_token(tokenizer, held_out),
        "tokenizer": tokenizer.identity(),
    }
    _write(output + ".json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def _check_settings(settings: TrainingSettings) -> None:
    """Raises DataError for an unknown model type or a vocabulary that is too small."""
    if settings.model_type not in MODEL_TYPES:
        raise DataError(
            f"model type = {settings.model_type!r} is unknown. Use one of: "
            f"{', '.join(MODEL_TYPES)}."
        )
    # <unk> and the end of document, special tokens, bytes.
    fixed = 2 + len(settings.special_tokens) + 256
    if settings.vocab_size <= fixed:
        raise DataError(
            f"vocab size = {settings.vocab_size}: {fixed} ids are taken by bytes and special "
            "tokens. Use more, such as 4096."
        )


def _utf8_size(chunks: Sequence[str]) -> int:
    """Bytes of texts in UTF-8."""
    return sum(len(chunk.encode()) for chunk in chunks)


def measure_bytes_a_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float | None:
    """UTF-8 bytes that a token stands for, on average; None where there is no token.

    Raises DataError when a text does not survive encoding and decoding.
    """
    tokens = 0
    for chunk, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        tokens += len(ids)
        if tokenizer.decode(ids.tolist()) != chunk:
            raise DataError(f"the tokenizer is not lossless: it changes {chunk[:80]!r}.")
    return _utf8_size(texts) / tokens if tokens else None


@contextmanager
def _standard_input_as_file(
    settings: TrainingSettings, standard_input: BinaryIO | None
) -> Iterator[TrainingSettings]:
    """The settings, with a file in place of standard input.

    Raises DataError where nothing says what format that has.
    """
    if STANDARD_INPUT not in settings.inputs or standard_input is None:
        yield settings
        return
    if settings.input_format == "auto":
        raise DataError(
            "--input -: standard input has no name that shows its format. Give --input-format "
            "jsonl, lines or text."
        )
    with tempfile.NamedTemporaryFile(prefix="standard_input.") as file:
        shutil.copyfileobj(standard_input, file)
        file.flush()
        inputs = tuple(file.name if name == STANDARD_INPUT else name for name in settings.inputs)
        yield replace(settings, inputs=inputs)


def _sample(
    settings: TrainingSettings, say: Callable[[str], None] = lambda text: None
) -> tuple[list[str], list[str]]:
    """(chunks for training, chunks held out)."""
    sources = find_sources(settings.inputs, settings.input_format)
    empty_files = [printable(source.path) for source in sources if not source.size]
    if empty_files:
        listed = ", ".join(empty_files[:_LISTED_FILES])
        more = " ..." if len(empty_files) > _LISTED_FILES else ""
        say(f"{len(empty_files)} input files are empty: {listed}{more}")

    # Every unit gives the same share of its bytes.
    share = min(1.0, settings.input_megabytes * 1e6 / max(_disk_bytes(sources), 1))
    training: list[str] = []
    held_out: list[str] = []
    bad: list[str] = []
    number = 0
    for unit in make_units(sources, _SPREAD_BYTES):
        budget = share * _disk_bytes(unit.sources)
        for chunk in _chunks(_texts(unit, settings, budget, bad)):
            is_held_out = number % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
            (held_out if is_held_out else training).append(chunk)
            number += 1

    if bad:
        say(f"{len(bad)} documents could not be read and are left out, the first one: {bad[0]}")
    if not training:
        raise DataError(
            f"no text in {len(sources)} input files. Name other files, or check --json-keys."
        )
    # A short text has nothing to hold out: something must be measured.
    return training, held_out or training[:1]


def _disk_bytes(sources: Sequence[Source]) -> int:
    """Size of files on disk together."""
    return sum(source.size for source in sources)


def _texts(unit: Unit, settings: TrainingSettings, budget: float, bad: list[str]) -> Iterator[str]:
    """Texts from the beginning of a unit, about `budget` bytes of them.

    Documents that cannot be read go to `bad`, as a sentence each.
    """
    used = 0
    for block in blocks_of(unit, _SPREAD_BYTES):
        for document in _readable(block, settings, bad):
            for text in document.texts:
                if used >= budget:
                    return
                # A character counts as a byte here: the budget is a rough one.
                excerpt = text[: max(int(budget) - used, 1)]
                used += len(excerpt)
                yield excerpt


def _readable(block: Block, settings: TrainingSettings, bad: list[str]) -> Iterator[Document]:
    """Documents of a block that can be read; the others go to `bad`."""
    try:
        for document in read_documents(block, settings.json_keys, settings.unicode):
            if isinstance(document, Document):
                yield document
            else:
                place = describe_place(block, document.place)
                bad.append(f"{place}: {document.reason}")
    # What follows in a damaged file is lost.
    except DataError as error:
        bad.append(str(error))


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Runs of whole lines of about _CHUNK_CHARACTERS; a longer line is cut."""
    for text in texts:
        start = 0
        while start < len(text):
            end = text.rfind("\n", start, start + _CHUNK_CHARACTERS) + 1
            # Without a newline in reach the line is cut; the last chunk goes to the text's end.
            if end <= start:
                end = min(start + _CHUNK_CHARACTERS, len(text))
            elif len(text) - start <= _CHUNK_CHARACTERS:
                end = len(text)
            yield text[start:end]
            start = end


def _train(settings: TrainingSettings, chunks: Sequence[str]) -> bytes:
    """The bytes of the model. Raises DataError for a vocabulary that the text cannot fill."""
    import sentencepiece

    # The trainer takes NUL for a broken file and the mark for a space; both are encoded as bytes
    # later.
    sentences = (chunk.replace(SPACE_MARK, "").replace("\0", "") for chunk in chunks)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
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
            f"SentencePiece cannot train a vocabulary of {settings.vocab_size} on this text: "
            f"{error}. Give more text, or a smaller one."
        ) from error
    return model.getvalue()


def _write(path: str, content: bytes) -> None:
    """Write a file by one rename, with the folders above it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(path + ".partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)
