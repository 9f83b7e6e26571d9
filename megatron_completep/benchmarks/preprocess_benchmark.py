"""How fast preprocessing is per core, beside the tokenizer library and Megatron-Core's builder.

All contestants tokenize the same documents with one process, in turn. CPU seconds are compared,
which other programs on the machine disturb little. Ours is all of `preprocess`: reading, JSON,
tokens, merge, report.
"""

import base64
import glob
import importlib
import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_completep.data.tokenizer import Tokenizer, build_tokenizer
from megatron_completep.preprocess.engines import one_thread_a_tokenizer
from megatron_completep.preprocess.run import preprocess
from megatron_completep.preprocess.settings import PreprocessSettings, TokenizerChoice
from megatron_completep.preprocess.tokenizer_training import TrainingSettings, train_tokenizer

_DOCUMENT_CHARACTERS = 4000
_VOCABULARY = 4096
_TRAINING_MEGABYTES = 8
_TRAINING_DOCUMENTS = 2000  # about as much text for the Hugging Face tokenizer
_END_OF_DOCUMENT = "<|endoftext|>"


def benchmark_preprocessing(
    megabytes: float, rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """MB of text per CPU second of each contestant, and the ratio of ours to each, by tokenizer.

    Figures are medians over the rounds. The corpus is the source of Python's standard library as
    JSON lines; vocabularies of 4096 are trained on it first.
    """
    one_thread_a_tokenizer()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = _write_corpus(folder / "corpus.jsonl", megabytes)
        size = sum(len(document.encode()) for document in documents)
        figures["megabytes"] = size / 1e6
        for choice in _train_tokenizers(folder, documents):
            say(f"{choice.type}: {rounds} rounds of {size / 1e6:.1f} MB")
            contestants = _contestants(folder, choice, documents)
            seconds = _cpu_seconds(contestants, rounds)
            figures[choice.type] = _summary(size, seconds)
            say(json.dumps(figures[choice.type]))
    return figures


def _cpu_seconds(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each contestant in each round."""
    # One after the other within a round, so that a slow phase of the machine slows all of them.
    seconds: dict[str, list[float]] = {contestant: [] for contestant in contestants}
    for _ in range(rounds):
        for contestant, work in contestants.items():
            start = time.process_time()
            work()
            seconds[contestant].append(time.process_time() - start)
    return seconds


def _summary(size: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The figures of one tokenizer for a text of `size` bytes."""
    megabytes = size / 1e6
    figures: dict[str, Any] = {}
    for name, contestant_seconds in seconds.items():
        rate = megabytes / statistics.median(contestant_seconds)
        figures[f"{name}_mb_per_cpu_second"] = round(rate, 3)

    our_seconds = seconds["ours"]
    for name, contestant_seconds in seconds.items():
        if name == "ours":
            continue
        # The ratio of two times of one round is less disturbed than that of two medians.
        rounds = zip(contestant_seconds, our_seconds, strict=True)
        ratios = sorted(contestant_time / our_time for contestant_time, our_time in rounds)
        figures[f"ours_over_{name}"] = {
            "median": round(statistics.median(ratios), 3),
            "low": round(ratios[0], 3),
            "high": round(ratios[-1], 3),
        }
    return figures


def _contestants(
    folder: Path, choice: TokenizerChoice, documents: list[str]
) -> dict[str, Callable[[], Any]]:
    """The programs that tokenize the corpus, by name; Megatron's only where it is installed."""
    tokenizer = build_tokenizer(choice)
    corpus = str(folder / "corpus.jsonl")
    settings = PreprocessSettings((corpus,), str(folder / "ours"), choice, append_eod=True)
    encode_all, encode = _library_calls(choice.type, tokenizer, documents)

    def ours() -> None:
        # Finished work is kept and reused, so what the last round left has to go.
        for path in folder.glob("ours*"):
            path.unlink()
        # A single worker works in this process, whose CPU time is measured.
        preprocess(settings, workers=1, log_interval=10**12)

    contestants: dict[str, Callable[[], Any]] = {"library": encode_all, "ours": ours}
    try:
        indexed_dataset = importlib.import_module("megatron.core.datasets.indexed_dataset")
    except ImportError:
        return contestants  # a dependency of the tests only

    def megatron() -> None:
        _build_as_megatron(indexed_dataset, folder, tokenizer, encode)

    return {**contestants, "megatron": megatron}


def _library_calls(
    kind: str, tokenizer: Tokenizer, documents: list[str]
) -> tuple[Callable[[], Any], Callable[[str], list[int]]]:
    """(the library's fastest call for all documents on one thread, its call for one document).

    Both return ids: the first a list for each document.
    """
    # The libraries are called without our tokenizers around them, through private attributes.
    library: Any = tokenizer
    if kind == "sentencepiece":
        processor = library._processor
        return lambda: processor.encode(documents, num_threads=1), processor.encode

    if kind == "huggingface":
        native = library._tokenizer

        def encode_all() -> list[list[int]]:
            encodings = native.encode_batch_fast(documents, add_special_tokens=False)
            return [encoding.ids for encoding in encodings]

        return encode_all, lambda document: native.encode(document, add_special_tokens=False).ids

    encoding = library._encoding
    encode: Callable[[str], list[int]] = encoding.encode_ordinary
    return lambda: encoding.encode_ordinary_batch(documents, num_threads=1), encode


def _build_as_megatron(
    indexed_dataset: Any, folder: Path, tokenizer: Tokenizer, encode: Callable[[str], list[int]]
) -> None:
    """The loop of Megatron's tools/preprocess_data.py with one worker, over the public builder.

    Its process pool is left out.
    """
    dtype = indexed_dataset.DType.optimal_dtype(tokenizer.vocab_size)
    builder = indexed_dataset.IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=dtype)
    with open(folder / "corpus.jsonl", encoding="utf-8") as file:
        for line in file:
            ids = encode(json.loads(line)["text"])
            # An empty document gets no end of document, and has no sequence.
            if ids:
                ids.append(tokenizer.eod_id or 0)
            builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(str(folder / "theirs.idx"))


def _write_corpus(path: Path, megabytes: float) -> list[str]:
    """Write and return documents of up to 4,000 characters, cut from Python's standard library."""
    documents: list[str] = []
    missing_characters = megabytes * 1e6
    library = sysconfig.get_paths()["stdlib"]
    for name in sorted(glob.glob(f"{library}/**/*.py", recursive=True)):
        if "site-packages" in name or missing_characters <= 0:
            continue
        source = Path(name).read_text("utf-8", errors="replace")
        for start in range(0, len(source), _DOCUMENT_CHARACTERS):
            documents.append(source[start : start + _DOCUMENT_CHARACTERS])
        missing_characters -= len(source)

    with open(path, "w", encoding="utf-8") as file:
        for number, document in enumerate(documents):
            file.write(json.dumps({"id": number, "text": document}) + "\n")
    return documents


def _train_tokenizers(folder: Path, documents: list[str]) -> list[TokenizerChoice]:
    """Train one tokenizer of each type on the corpus, so that nothing is downloaded."""
    sentencepiece = folder / "t.model"
    corpus = str(folder / "corpus.jsonl")
    settings = TrainingSettings((corpus,), _VOCABULARY, input_megabytes=_TRAINING_MEGABYTES)
    train_tokenizer(settings, str(sentencepiece))

    huggingface = folder / "tokenizer.json"
    merges = _train_huggingface(huggingface, documents[:_TRAINING_DOCUMENTS])
    tiktoken = folder / "mine.tiktoken"
    _write_tiktoken_ranks(tiktoken, merges)
    return [
        TokenizerChoice("sentencepiece", str(sentencepiece)),
        TokenizerChoice("huggingface", str(huggingface)),
        TokenizerChoice("tiktoken", f"cl100k_base:{tiktoken}"),
    ]


def _train_huggingface(path: Path, documents: list[str]) -> list[list[str]]:
    """Train and save a byte-level BPE; returns its merges, pairs of tokens."""
    tokenizers = importlib.import_module("tokenizers")
    # A byte-level alphabet writes every document without an unknown token.
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = byte_level(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        initial_alphabet=byte_level.alphabet(),
        special_tokens=[_END_OF_DOCUMENT],
        show_progress=False,
    )
    library.train_from_iterator(documents, trainer)
    library.save(str(path))
    merges: list[list[str]] = json.loads(library.to_str())["model"]["merges"]
    return merges


def _write_tiktoken_ranks(path: Path, merges: list[list[str]]) -> None:
    """Write the merges of a byte-level BPE as a file of ranks."""
    # Ranks decide which merge comes first; the single bytes come before all merges.
    tokens = [bytes([byte]) for byte in range(256)]
    for merge in merges:
        tokens.append(_byte_level_bytes("".join(merge)))

    # Two merges may make the same token; the first one counts.
    with open(path, "wb") as file:
        for rank, token in enumerate(dict.fromkeys(tokens)):
            file.write(base64.b64encode(token) + b" %d\n" % rank)


def _byte_level_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level BPE stands for.

    Printable Latin-1 bytes are written as themselves; the others, in order, as the characters from
    U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    token_bytes = bytearray()
    for character in token:
        code = ord(character)
        token_bytes.append(code if code in printable else unprintable[code - 0x100])
    return bytes(token_bytes)
