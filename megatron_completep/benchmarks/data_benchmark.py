"""Measurements of reading behind tools/benchmark_data.py: each in a fresh process, on files made for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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

CHUNK = 1 << 20
MEAN_LENGTH = 500  # tokens a document of the synthetic corpus


@dataclass(frozen=True)
class ReadingSettings:
    """What is measured: an index of that many documents, samples of seq_length tokens, that many random seeks."""

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
        say("opening it and seeking in a fresh process")
        words = [
            sys.executable,
            "-m",
            "megatron_completep.benchmarks.data_benchmark",
            prefix,
            str(settings.seq_length),
            str(settings.seeks),
        ]
        figures |= json.loads(
            subprocess.run(words, check=True, capture_output=True, text=True).stdout
        )
        say("jumping in blends")
        figures |= measure_blend()
        say("loading batches")
        figures |= measure_loader(prefix, settings.seq_length)
    return figures


def write_synthetic(prefix: str, documents: int) -> int:
    """An index of one-sequence documents of random length beside a sparse .bin of zeros; returns the number of tokens."""
    lengths_per_chunk = [min(CHUNK, documents - start) for start in range(0, documents, CHUNK)]

    def lengths(number: int) -> np.ndarray:
        return np.random.default_rng(number).integers(1, 2 * MEAN_LENGTH, lengths_per_chunk[number])

    with open(prefix + ".idx", "wb") as file:
        file.write(
            HEADER.pack(
                MAGIC,
                VERSION,
                next(c for c, d in DTYPES.items() if d == np.uint16),
                documents,
                documents + 1,
            )
        )
        for number in range(len(lengths_per_chunk)):
            file.write(lengths(number).astype("<i4").tobytes())
        total = 0
        for number in range(len(lengths_per_chunk)):
            ends = total + np.cumsum(lengths(number))
            file.write((2 * (ends - lengths(number))).astype("<i8").tobytes())
            total = int(ends[-1])
        for start in range(0, documents + 1, CHUNK):
            file.write(np.arange(start, min(start + CHUNK, documents + 1), dtype="<i8").tobytes())
    with open(prefix + ".bin", "wb") as file:
        file.truncate(2 * total)
    return total


def resident_bytes() -> int:
    """Resident memory of this process, mapped pages of files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_open_and_seek(prefix: str, seq_length: int, seeks: int) -> dict[str, float]:
    """Time and resident memory of opening; time of single seeks, cold (first touch in this process) and again."""
    before = resident_bytes()
    started = time.perf_counter()
    dataset = IndexedDataset(prefix)
    source = PermutedSource(dataset, seq_length, seed=1)
    opened = time.perf_counter() - started
    resident = resident_bytes() - before
    indices = np.random.default_rng(0).integers(source.samples_per_epoch, size=seeks).tolist()
    rounds = []
    for _ in range(2):
        times = []
        for index in indices:
            started = time.perf_counter()
            source[index]
            times.append(time.perf_counter() - started)
        rounds.append(sorted(times))
    cold, warm = rounds
    return {
        "open_seconds": round(opened, 4),
        "open_resident_mb": round(resident / 1e6, 2),
        "seek_first_touch_us_median": round(median(cold) * 1e6, 1),
        "seek_us_median": round(median(warm) * 1e6, 1),
        "seek_us_99th_percentile": round(warm[int(0.99 * len(warm))] * 1e6, 1),
    }


def measure_blend() -> dict[str, float]:
    """A jump into a blend whose weights repeat (decimals) and into one whose weights do not."""
    figures = {}
    for name, weights in {
        "decimal": [0.5, 0.3, 0.15, 0.05],
        "arbitrary": [0.512345678, 0.3, 0.137, 0.0517],
    }.items():
        blend = Blend(weights)
        started = time.perf_counter()
        blend[10**12 + 12345]
        figures[f"blend_{name}_first_jump_ms"] = round((time.perf_counter() - started) * 1e3, 2)
        started = time.perf_counter()
        for k in range(1000):
            blend[10**12 + 12345 + k]
        figures[f"blend_{name}_next_us"] = round((time.perf_counter() - started) * 1e3, 2)
    return figures


def measure_loader(prefix: str, seq_length: int) -> dict[str, float]:
    """Tokens a second of one rank's loader without prefetching."""
    data = DataConfig(train=[SourceConfig(prefix=prefix)], prefetch=0)
    loader = build_loader(
        data,
        seq_length=seq_length,
        micro_batch_size=4,
        global_batch_size=16,
        train_steps=1000,
        vocab_size=65536,
        data_rank=0,
        data_size=1,
    )
    times = []
    for _ in range(20):
        started = time.perf_counter()
        loader.next_step()
        times.append(time.perf_counter() - started)
    return {"loader_tokens_per_second": round(16 * seq_length / median(times))}


if __name__ == "__main__":
    print(json.dumps(measure_open_and_seek(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
