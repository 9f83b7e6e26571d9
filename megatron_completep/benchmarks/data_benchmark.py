"""Measurements of reading behind tools/benchmark_data.py, on synthetic token files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from megatron_completep.config.schema import DataConfig, SourceConfig
from megatron_completep.data.blend import Blend
from megatron_completep.data.indexed import DTYPES, HEADER, MAGIC, VERSION, IndexedDataset
from megatron_completep.data.loader import build_loader
from megatron_completep.data.samples import PermutedSource

CHUNK = 1 << 20  # documents that are generated at a time
MEAN_LENGTH = 500  # tokens a document of the synthetic corpus
TOKEN_BYTES = 2  # of uint16
GLOBAL_BATCH = 16  # samples a step of the loader
LOADER_STEPS = 20
FAR_SAMPLE = 10**12 + 12345  # far enough into a blend that nothing can count up to it


@dataclass(frozen=True)
class ReadingSettings:
    """What is measured: an index of so many documents, samples of seq_length tokens, so many seeks.

    The synthetic files go into a new folder inside `folder`, by default the system's temporary one.
    """

    documents: int = 1_000_000
    seq_length: int = 4096
    seeks: int = 5000
    folder: str | None = None


def benchmark_reading(settings: ReadingSettings, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures of reading, by name; times in seconds or microseconds as the name says."""
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        prefix = str(Path(folder) / "synthetic")
        say(f"writing an index of {settings.documents:,} documents")
        tokens = write_synthetic(prefix, settings.documents)
        figures: dict[str, Any] = {
            "documents": settings.documents,
            "tokens": tokens,
            "index_bytes": Path(prefix + ".idx").stat().st_size,
        }

        # Resident memory and first touches mean something only in a process that has not yet
        # mapped the files.
        say("opening it and seeking in a fresh process")
        module = "megatron_completep.benchmarks.data_benchmark"
        sizes = [str(settings.seq_length), str(settings.seeks)]
        command = [sys.executable, "-m", module, prefix, *sizes]
        finished = subprocess.run(command, check=True, capture_output=True, text=True)
        figures |= json.loads(finished.stdout)

        say("jumping in blends")
        figures |= measure_blend()
        say("loading batches")
        figures |= measure_loader(prefix, settings.seq_length)
    return figures


def _document_lengths(documents: int) -> Iterator[np.ndarray]:
    """Random lengths in tokens, a chunk of documents at a time; the same ones in every call."""
    for number, start in enumerate(range(0, documents, CHUNK)):
        generator = np.random.default_rng(number)
        yield generator.integers(1, 2 * MEAN_LENGTH, min(CHUNK, documents - start))


def write_synthetic(prefix: str, documents: int) -> int:
    """Write PREFIX.idx with one-sequence documents of random length and PREFIX.bin with zeros.

    Returns the number of tokens. The .bin is sparse, so that it takes no space on the disk.
    """
    dtype_code = next(code for code, dtype in DTYPES.items() if dtype == np.uint16)
    with open(prefix + ".idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, dtype_code, documents, documents + 1))

        # The format stores all lengths, then all byte offsets, then the number of each document's
        # first sequence. Lengths are drawn twice: those of 10^9 documents would not fit in memory.
        for lengths in _document_lengths(documents):
            file.write(lengths.astype("<i4").tobytes())

        total = 0
        for lengths in _document_lengths(documents):
            ends = total + np.cumsum(lengths)
            offsets = TOKEN_BYTES * (ends - lengths)
            file.write(offsets.astype("<i8").tobytes())
            total = int(ends[-1])

        for start in range(0, documents + 1, CHUNK):
            end = min(start + CHUNK, documents + 1)
            file.write(np.arange(start, end, dtype="<i8").tobytes())

    with open(prefix + ".bin", "wb") as file:
        file.truncate(TOKEN_BYTES * total)
    return total


def resident_bytes() -> int:
    """Resident memory of this process, mapped pages of files included."""
    fields = Path("/proc/self/statm").read_text().split()
    resident_pages = int(fields[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE")


def measure_open_and_seek(prefix: str, seq_length: int, seeks: int) -> dict[str, float]:
    """Time and resident memory of opening; time of single seeks, cold and warm.

    Cold is the first touch of a sample in this process, warm the second.
    """
    resident_before = resident_bytes()
    started = time.perf_counter()
    dataset = IndexedDataset(prefix)
    source = PermutedSource(dataset, seq_length, seed=1)
    open_seconds = time.perf_counter() - started
    resident = resident_bytes() - resident_before

    generator = np.random.default_rng(0)
    indices = generator.integers(source.samples_per_epoch, size=seeks).tolist()
    cold_seconds = _seek_seconds(source, indices)
    warm_seconds = _seek_seconds(source, indices)
    slow_seek = warm_seconds[int(0.99 * len(warm_seconds))]
    return {
        "open_seconds": round(open_seconds, 4),
        "open_resident_mb": round(resident / 1e6, 2),
        "seek_first_touch_us_median": round(median(cold_seconds) * 1e6, 1),
        "seek_us_median": round(median(warm_seconds) * 1e6, 1),
        "seek_us_99th_percentile": round(slow_seek * 1e6, 1),
    }


def _seek_seconds(source: PermutedSource, indices: list[int]) -> list[float]:
    """Seconds that reading each of these samples takes, sorted."""
    seconds = []
    for index in indices:
        started = time.perf_counter()
        source[index]
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)


def measure_blend() -> dict[str, float]:
    """A jump into a blend whose weights repeat (decimals) and into one whose weights do not."""
    weights_by_name = {
        "decimal": [0.5, 0.3, 0.15, 0.05],
        "arbitrary": [0.512345678, 0.3, 0.137, 0.0517],
    }
    figures = {}
    for name, weights in weights_by_name.items():
        blend = Blend(weights)
        started = time.perf_counter()
        blend[FAR_SAMPLE]
        jump_seconds = time.perf_counter() - started
        figures[f"blend_{name}_first_jump_ms"] = round(jump_seconds * 1e3, 2)

        started = time.perf_counter()
        for offset in range(1000):
            blend[FAR_SAMPLE + offset]
        thousand_seconds = time.perf_counter() - started
        # Seconds of a thousand samples are milliseconds of one, and 1e3 makes them microseconds.
        figures[f"blend_{name}_next_us"] = round(thousand_seconds * 1e3, 2)
    return figures


def measure_loader(prefix: str, seq_length: int) -> dict[str, float]:
    """Tokens a second of one rank's loader without prefetching."""
    # Prefetching would do the work in a thread beside the clock.
    data = DataConfig(train=[SourceConfig(prefix=prefix)], prefetch=0)
    loader = build_loader(
        data,
        seq_length=seq_length,
        micro_batch_size=4,
        global_batch_size=GLOBAL_BATCH,
        train_steps=1000,
        vocab_size=65536,
        data_rank=0,
        data_size=1,
    )
    seconds = []
    for _ in range(LOADER_STEPS):
        started = time.perf_counter()
        loader.next_step()
        seconds.append(time.perf_counter() - started)
    tokens = GLOBAL_BATCH * seq_length
    return {"loader_tokens_per_second": round(tokens / median(seconds))}


if __name__ == "__main__":
    _, prefix_word, seq_length_word, seeks_word = sys.argv
    print(json.dumps(measure_open_and_seek(prefix_word, int(seq_length_word), int(seeks_word))))
