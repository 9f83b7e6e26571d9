"""What a part of the GPU report is handed, and the figures that it prints."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_completep.command_line import Parser, real
from megatron_completep.errors import ConfigError, exit_on_user_error


@dataclass(frozen=True)
class Figure:
    """One measured figure, beside what was expected before the run.

    expected: what the step model or the definition says; None where nothing was predicted.
    at_least, at_most: the goal, where there is one. failed: why there is nothing measured.
    details: further values, for a reader.
    """

    name: str
    measured: float | str | None = None
    unit: str = ""
    expected: float | str | None = None
    at_least: float | None = None
    at_most: float | None = None
    failed: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.failed:
            return False
        if self.at_least is None and self.at_most is None:
            return None
        # A NaN reaches no goal, so the comparisons ask what holds and not what is broken.
        number = float("nan") if self.measured is None else float(self.measured)
        reaches_low = self.at_least is None or number >= self.at_least
        reaches_high = self.at_most is None or number <= self.at_most
        return reaches_low and reaches_high

    def to_json(self) -> str:
        """One line; what is empty is left out, but never what was measured or expected."""
        row: dict[str, Any] = {"figure": self.name}
        if self.failed:
            row["failed"] = self.failed
        else:
            row |= {"measured": _short(self.measured), "unit": self.unit}
        row["expected"] = _short(self.expected)
        for name in ("at_least", "at_most", "passed"):
            if (entry := getattr(self, name)) is not None:
                row[name] = entry
        row |= {name: _short(entry) for name, entry in self.details.items()}
        return json.dumps(row)


def _short(entry: Any) -> Any:
    """Five significant digits, which is more than a measurement has."""
    return float(f"{entry:.5g}") if isinstance(entry, float) else entry


Say = Callable[[Figure], None]


@dataclass(frozen=True)
class Setting:
    """Where and how long a part measures.

    folder: where it writes what is more than a figure. deadline: on `time.monotonic`; nothing that
    takes minutes starts after it. trial: tiny shapes on a CPU, to see that the part runs; its times
    mean nothing.
    """

    device: torch.device
    folder: Path
    deadline: float
    say: Say
    trial: bool = False

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def device_name(self) -> str:
        """The maker's name, by which expectations are found."""
        return torch.cuda.get_device_name(self.device) if self.on_gpu else "cpu"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What fails inside is a figure that failed; the part goes on behind it."""
        try:
            yield
        # Whatever a library raises on a machine that nobody has seen.
        except Exception as error:
            traceback.print_exc()
            lines = str(error).splitlines() or [""]
            self.say(Figure(name, failed=f"{type(error).__name__}: {lines[0][:300]}"))


def milliseconds(setting: Setting, work: Callable[[], Any]) -> float:
    """Median of a call; on a GPU with its cache cleared before each repetition."""
    if setting.on_gpu:
        # Imported here, as a trial on a CPU needs no Triton.
        from triton.testing import do_bench

        median: float = do_bench(work, warmup=20, rep=60, quantiles=[0.5])
        return median
    work()
    # The call above has allocated and compiled, and is not timed.
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def run_part(
    measure: Callable[[Setting], None], doc: str | None, argv: Sequence[str] | None = None
) -> int:
    """The command line of a part. Returns 0: what failed or misses its goal is in the figures."""
    parser = Parser(doc)
    parser.add_argument("--out", type=Path, required=True, help="folder for profiles and pages")
    parser.add_argument(
        "--seconds",
        type=real(at_least=0, at_most=10**6),
        default=570.0,
        help="start nothing long after this many (default: 570)",
    )
    parser.add_argument("--cpu", action="store_true", help="a trial on tiny shapes")
    arguments: argparse.Namespace = parser.parse_args(argv)
    if not arguments.cpu and not torch.cuda.is_available():
        raise ConfigError("no GPU is visible to torch. Try the part with --cpu.")
    arguments.out.mkdir(parents=True, exist_ok=True)

    def say(figure: Figure) -> None:
        # At once, so that a part which is stopped later has said what it measured.
        print(figure.to_json(), flush=True)

    device = torch.device("cpu")
    if not arguments.cpu:
        device = torch.device("cuda", torch.cuda.current_device())
    # Counted from here: what the report's own limit is longer has to cover the imports.
    deadline = time.monotonic() + arguments.seconds
    measure(Setting(device, arguments.out, deadline, say, arguments.cpu))
    return 0


def main(measure: Callable[[Setting], None], doc: str | None) -> None:
    """What a part runs as a program."""
    exit_on_user_error(lambda: run_part(measure, doc, sys.argv[1:]))
