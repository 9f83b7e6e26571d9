"""How fast preprocessing is beside the tokenizer library's own batch call, and beside Megatron-Core's builder, per core.

All contestants tokenize the same documents with one process, in alternation; CPU seconds are compared, so that other programs on the
machine disturb little. Ours is the whole of `preprocess`: reading, JSON, tokens, merge, report.
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


def benchmark_preprocessing(
    megabytes: float, rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Figures a tokenizer type: MB of text per CPU second of each contestant, and ours over each other one (medians over rounds).

    The corpus is the source of Python's standard library as JSON lines; vocabularies of 4096 are trained on it first.
    """
    one_thread_a_tokenizer()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = _write_corpus(folder / "corpus.jsonl", megabytes)
        size = sum(len(text.encode()) for text in texts)
        figures["megabytes"] = size / 1e6
        for choice in _train_tokenizers(folder, texts):
            say(f"{choice.type}: {rounds} rounds of {size / 1e6:.1f} MB")
            contestants = _contestants(folder, choice, texts)
            seconds: dict[str, list[float]] = {contestant: [] for contestant in contestants}
            for _ in range(rounds):
                for contestant, work in contestants.items():
                    start = time.process_time()
                    work()
                    seconds[contestant].append(time.process_time() - start)
            figures[choice.type] = _summary(size, seconds)
            say(json.dumps(figures[choice.type]))
    return figures


def _summary(size: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    result: dict[str, Any] = {
        f"{name}_mb_per_cpu_second": round(size / 1e6 / statistics.median(s), 3)
        for name, s in seconds.items()
    }
    for name in seconds:
        if name != "ours":
            ratios = sorted(
                theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True)
            )
            result[f"ours_over_{name}"] = {
                "median": round(statistics.median(ratios), 3),
                "low": round(ratios[0], 3),
                "high": round(ratios[-1], 3),
            }
    return result


def _contestants(
    folder: Path, choice: TokenizerChoice, texts: list[str]
) -> dict[str, Callable[[], Any]]:
    tokenizer = build_tokenizer(choice)
    settings = PreprocessSettings(
        (str(folder / "corpus.jsonl"),), str(folder / "ours"), choice, append_eod=True
    )
    batch, single = _library_calls(choice.type, tokenizer, texts)

    def ours() -> None:
        for name in folder.glob("ours*"):
            name.unlink()
        preprocess(settings, workers=1, log_interval=10**12)

    contestants: dict[str, Callable[[], Any]] = {"library": batch, "ours": ours}
    try:
        indexed_dataset = importlib.import_module("megatron.core.datasets.indexed_dataset")
    except ImportError:
        return contestants  # a test-only dependency
    return {
        **contestants,
        "megatron": lambda: _build_as_megatron(indexed_dataset, folder, tokenizer, single),
    }


def _library_calls(
    kind: str, tokenizer: Tokenizer, texts: list[str]
) -> tuple[Callable[[], Any], Callable[[str], list[int]]]:
    """The library's fastest call for all texts on one thread, and its call for one text; both give lists of ids."""
    library: Any = tokenizer
    if kind == "sentencepiece":
        return lambda: library._processor.encode(texts, num_threads=1), library._processor.encode
    if kind == "huggingface":
        native = library._tokenizer
        return (
            lambda: [
                encoding.ids
                for encoding in native.encode_batch_fast(texts, add_special_tokens=False)
            ],
            lambda text: native.encode(text, add_special_tokens=False).ids,
        )
    return lambda: library._encoding.encode_ordinary_batch(
        texts, num_threads=1
    ), library._encoding.encode_ordinary


def _build_as_megatron(
    indexed_dataset: Any, folder: Path, tokenizer: Tokenizer, encode: Callable[[str], list[int]]
) -> None:
    """The loop of Megatron's tools/preprocess_data.py with one worker, over the public builder, without its process pool."""
    dtype = indexed_dataset.DType.optimal_dtype(tokenizer.vocab_size)
    builder = indexed_dataset.IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=dtype)
    with open(folder / "corpus.jsonl", encoding="utf-8") as file:
        for line in file:
            ids = encode(json.loads(line)["text"])
            if ids:
                ids.append(tokenizer.eod_id or 0)
            builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(str(folder / "theirs.idx"))


def _write_corpus(path: Path, megabytes: float) -> list[str]:
    """Documents of up to 4,000 characters, of Python's standard library."""
    texts: list[str] = []
    left = megabytes * 1e6
    root = sysconfig.get_paths()["stdlib"]
    for name in sorted(glob.glob(f"{root}/**/*.py", recursive=True)):
        if "site-packages" in name or left <= 0:
            continue
        text = Path(name).read_text("utf-8", errors="replace")
        parts = [
            text[start : start + _DOCUMENT_CHARACTERS]
            for start in range(0, len(text), _DOCUMENT_CHARACTERS)
        ]
        texts += parts
        left -= len(text)
    path.write_text(
        "".join(
            json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts)
        ),
        "utf-8",
    )
    return texts


def _train_tokenizers(folder: Path, texts: list[str]) -> list[TokenizerChoice]:
    """One of each type; tiktoken gets the ranks of the Hugging Face one, so that nothing is downloaded."""
    train_tokenizer(
        TrainingSettings((str(folder / "corpus.jsonl"),), _VOCABULARY, input_megabytes=8),
        str(folder / "t.model"),
    )
    tokenizers = importlib.import_module("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    library.train_from_iterator(texts[:2000], trainer)
    library.save(str(folder / "tokenizer.json"))
    merges = json.loads(library.to_str())["model"]["merges"]
    tokens = [bytes([byte]) for byte in range(256)] + [
        _byte_level_bytes("".join(merge)) for merge in merges
    ]
    ranks = dict.fromkeys(tokens)  # two merges may make the same token; the first one counts
    (folder / "mine.tiktoken").write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    )
    return [
        TokenizerChoice("sentencepiece", str(folder / "t.model")),
        TokenizerChoice("huggingface", str(folder / "tokenizer.json")),
        TokenizerChoice("tiktoken", f"cl100k_base:{folder / 'mine.tiktoken'}"),
    ]


def _byte_level_bytes(token: str) -> bytes:
    """Byte-level BPE writes printable Latin-1 bytes as themselves and the others, in order, as the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return bytes(
        ord(character) if ord(character) in printable else others[ord(character) - 0x100]
        for character in token
    )
