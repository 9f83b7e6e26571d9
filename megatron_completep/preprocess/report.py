"""Lengths of the documents: statistics, a JSON report and a picture."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BINS_AN_OCTAVE = 32  # percentiles are exact to 1/32 of an octave: 2.2 %
_PERCENTILES = (10, 50, 90, 99)
_BARS_AN_OCTAVE = 4  # of the picture


@dataclass
class Histogram:
    """Counts of whole numbers >= 0 in logarithmic bins; zero has a bin of its own.

    Memory does not depend on how many numbers are added.
    """

    counts: npt.NDArray[np.int64]
    total: int = 0
    smallest: int | None = None
    largest: int = 0

    @classmethod
    def empty(cls) -> "Histogram":
        """A histogram of numbers below 2^64."""
        return cls(np.zeros(1 + 64 * BINS_AN_OCTAVE, np.int64))

    def add(self, numbers: npt.NDArray[Any]) -> None:
        """Count numbers [n]."""
        if not len(numbers):
            return
        # Bin 0 is zero, and bin 1 begins at 1.
        bins = np.zeros(len(numbers), np.int64)
        positive = numbers > 0
        octaves = np.log2(numbers[positive].astype(np.float64))
        bins[positive] = 1 + np.floor(octaves * BINS_AN_OCTAVE).astype(np.int64)
        self.counts += np.bincount(bins, minlength=len(self.counts))
        self.total += int(numbers.sum())
        smallest = int(numbers.min())
        self.smallest = smallest if self.smallest is None else min(self.smallest, smallest)
        self.largest = max(self.largest, int(numbers.max()))

    def percentile(self, q: float) -> int:
        """The number below which a share q of the numbers lies, to 2.2 %."""
        rank = q * self.counts.sum()
        index = int(np.searchsorted(np.cumsum(self.counts), rank, side="left"))
        # The middle of bin `index`, on the logarithmic scale.
        middle = 0 if index == 0 else round(2 ** ((index - 0.5) / BINS_AN_OCTAVE))
        return min(max(middle, self.smallest or 0), self.largest)

    def summary(self) -> dict[str, Any]:
        """Sum, mean, extremes and percentiles, for JSON."""
        number = int(self.counts.sum())
        if not number:
            return {"total": 0}
        percentiles = {f"p{percent}": self.percentile(percent / 100) for percent in _PERCENTILES}
        return {
            "total": self.total,
            "mean": self.total / number,
            "min": self.smallest,
            **percentiles,
            "max": self.largest,
        }


class LengthStatistics:
    """Lengths of documents.

    text_bytes: UTF-8 bytes of all keys' texts together. tokens: a histogram a key, end-of-document
    tokens included.
    """

    def __init__(self, keys: int):
        self.documents = 0
        self.text_bytes = Histogram.empty()
        self.tokens = [Histogram.empty() for _ in range(keys)]

    def add(self, text_bytes: npt.NDArray[Any], tokens: npt.NDArray[Any]) -> None:
        """Count documents. text_bytes: [documents]; tokens: [keys, documents]."""
        self.documents += len(text_bytes)
        self.text_bytes.add(text_bytes)
        for histogram, counts in zip(self.tokens, tokens, strict=True):
            histogram.add(counts)


def write_report(
    path: str, report: dict[str, Any], statistics: LengthStatistics, keys: tuple[str, ...]
) -> None:
    """Write PATH.png, then PATH.json, each by one rename."""
    _draw(f"{path}.png", statistics, keys)
    temporary = Path(f"{path}.json.partial")
    temporary.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    os.replace(temporary, f"{path}.json")


def _draw(path: str, statistics: LengthStatistics, keys: tuple[str, ...]) -> None:
    """Draw both histograms into a PNG file."""
    # Without pyplot, which would choose a back end and may open a window.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1)
    _bars(above, statistics.text_bytes, "text", "bytes a document (UTF-8)")
    for key, histogram in zip(keys, statistics.tokens, strict=True):
        _bars(below, histogram, key, "tokens a document")
    above.set_title(f"{statistics.documents:,} documents, {statistics.text_bytes.total:,} bytes")
    temporary = path + ".partial"
    figure.savefig(temporary, dpi=120, format="png")
    os.replace(temporary, path)


def _bars(axes: Any, histogram: Histogram, label: str, unit: str) -> None:
    """Draw one histogram, from its first to its last filled bar."""
    bins_a_bar = BINS_AN_OCTAVE // _BARS_AN_OCTAVE
    counts = histogram.counts[1:].reshape(-1, bins_a_bar).sum(axis=1)
    edges = 2.0 ** (np.arange(len(counts) + 1) / _BARS_AN_OCTAVE)
    filled = np.flatnonzero(counts)
    begin = int(filled[0]) if len(filled) else 0
    end = int(filled[-1]) + 1 if len(filled) else 1
    axes.stairs(
        counts[begin:end],
        edges[begin : end + 1],
        fill=True,
        alpha=0.6,
        # A logarithmic axis has no place for zero.
        label=f"{label}, {histogram.counts[0]:,} empty",
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda number, _: _plain_number(number))
    axes.set_xlabel(unit)
    axes.set_ylabel("documents")
    axes.legend()


def _plain_number(number: float) -> str:
    """64, 2 Ki, 1 Mi."""
    for unit in ("", " Ki", " Mi", " Gi"):
        if number < 1024:
            return f"{number:g}{unit}"
        number /= 1024
    return f"{number:g} Ti"
