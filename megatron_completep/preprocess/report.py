"""How long the documents are: statistics, a JSON report and a picture."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BINS_AN_OCTAVE = 32  # percentiles are exact to 1/32 of an octave: 2.2 %


@dataclass
class Histogram:
    """Counts of whole numbers >= 0 in logarithmic bins; zero has a bin of its own. Memory does not depend on how many are added."""

    counts: npt.NDArray[np.int64]
    total: int = 0
    smallest: int | None = None
    largest: int = 0

    @classmethod
    def empty(cls) -> "Histogram":
        return cls(np.zeros(1 + 64 * BINS_AN_OCTAVE, np.int64))

    def add(self, values: npt.NDArray[Any]) -> None:
        if not len(values):
            return
        bins = np.zeros(len(values), np.int64)
        positive = values > 0
        bins[positive] = 1 + np.floor(
            np.log2(values[positive].astype(np.float64)) * BINS_AN_OCTAVE
        ).astype(np.int64)
        self.counts += np.bincount(bins, minlength=len(self.counts))
        self.total += int(values.sum())
        self.smallest = (
            int(values.min()) if self.smallest is None else min(self.smallest, int(values.min()))
        )
        self.largest = max(self.largest, int(values.max()))

    def percentile(self, q: float) -> int:
        """The value below which a share q of the numbers lies, to 2.2 %."""
        index = int(np.searchsorted(np.cumsum(self.counts), q * self.counts.sum(), side="left"))
        value = 0 if index == 0 else round(2 ** ((index - 0.5) / BINS_AN_OCTAVE))
        return min(max(value, self.smallest or 0), self.largest)

    def summary(self) -> dict[str, Any]:
        number = int(self.counts.sum())
        if not number:
            return {"total": 0}
        shares = {f"p{round(q * 100)}": self.percentile(q) for q in (0.1, 0.5, 0.9, 0.99)}
        return {
            "total": self.total,
            "mean": self.total / number,
            "min": self.smallest,
            **shares,
            "max": self.largest,
        }


class LengthStatistics:
    """Lengths of documents: UTF-8 bytes of all keys' texts together, and tokens a key (end-of-document tokens included)."""

    def __init__(self, keys: int):
        self.documents = 0
        self.text_bytes = Histogram.empty()
        self.tokens = [Histogram.empty() for _ in range(keys)]

    def add(self, text_bytes: npt.NDArray[Any], tokens: npt.NDArray[Any]) -> None:
        self.documents += len(text_bytes)
        self.text_bytes.add(text_bytes)
        for histogram, row in zip(self.tokens, tokens, strict=True):
            histogram.add(row)


def write_report(
    path: str, report: dict[str, Any], statistics: LengthStatistics, keys: tuple[str, ...]
) -> None:
    """PATH.png, then PATH.json, each at once."""
    _draw(f"{path}.png", statistics, keys)
    temporary = Path(f"{path}.json.partial")
    temporary.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    os.replace(temporary, f"{path}.json")


def _draw(path: str, statistics: LengthStatistics, keys: tuple[str, ...]) -> None:
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
    step = BINS_AN_OCTAVE // 4
    counts = histogram.counts[1:].reshape(-1, step).sum(axis=1)
    edges = 2.0 ** (np.arange(len(counts) + 1) / 4)
    filled = np.flatnonzero(counts)
    last = int(filled[-1]) + 1 if len(filled) else 1
    first = int(filled[0]) if len(filled) else 0
    axes.stairs(
        counts[first:last],
        edges[first : last + 1],
        fill=True,
        alpha=0.6,
        label=f"{label}, {histogram.counts[0]:,} empty",
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: _plain_number(value))
    axes.set_xlabel(unit)
    axes.set_ylabel("documents")
    axes.legend()


def _plain_number(value: float) -> str:
    """64, 2 Ki, 1 Mi."""
    for unit in ("", " Ki", " Mi", " Gi"):
        if value < 1024:
            return f"{value:g}{unit}"
        value /= 1024
    return f"{value:g} Ti"
