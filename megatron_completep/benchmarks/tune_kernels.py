"""Times candidate launch parameters of every kernel on the GPU at hand and writes the best into the launch table (kernels/tuned.py)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_completep.benchmarks.tuning_cases import Tunable
from megatron_completep.kernels import launch, tuned
from megatron_completep.kernels.ahead_of_time import record

Work = Callable[[], Any]
Table = dict[tuple[str, int, int], tuple[int, ...]]


@dataclass(frozen=True)
class Choice:
    """The best parameters of one entry of the table, and its geometric mean of microseconds beside that of today's parameters."""

    parameters: tuple[int, ...]
    time: float
    time_before: float


@contextmanager
def launch_parameters(
    architecture: str, key: tuple[str, int, int], parameters: tuple[int, ...]
) -> Iterator[None]:
    """Let one entry of the table be `parameters` inside the block."""
    table = tuned.TUNED.setdefault(architecture, {})
    before = table.get(key)
    table[key] = parameters
    launch.forget()
    try:
        yield
    finally:
        if before is None:
            del table[key]
        else:
            table[key] = before
        if not table:
            del tuned.TUNED[architecture]
        launch.forget()


def median_microseconds(work: Work) -> float:
    from triton.testing import do_bench

    return 1e3 * do_bench(work, warmup=10, rep=40, quantiles=[0.5])


def launches_instead(architecture: str) -> Callable[[Work], float]:
    """A clock for a dry run on `meta` tensors: it launches nothing, and takes the number of programs for the time."""
    return lambda work: float(
        sum(math.prod(launched.grid) for launched in record(work, architecture))
    )


def tune(
    architecture: str,
    tunables: Iterable[Tunable],
    time: Callable[[Work], float],
    say: Callable[[str], None],
) -> dict[tuple[str, int, int], Choice]:
    """The best candidate of each tunable: the smallest geometric mean over its sizes. One that cannot run is reported and left out."""
    chosen = {}
    for tunable in tunables:
        times = {}
        for candidate in tunable.candidates:
            try:
                with launch_parameters(architecture, tunable.key, candidate):
                    times[candidate] = statistics.geometric_mean(
                        [time(prepare()) for prepare in tunable.sizes]
                    )
            except (
                Exception
            ) as error:  # too many registers or too much shared memory for this part, for instance
                say(
                    f"{tunable.name} {candidate}: left out: {type(error).__name__}: {error}".splitlines()[
                        0
                    ]
                )
        if times:
            best = min(times, key=lambda candidate: times[candidate])
            before = statistics.geometric_mean([time(prepare()) for prepare in tunable.sizes])
            chosen[tunable.key] = Choice(best, times[best], before)
            say(
                f"{tunable.name}: {best} {times[best]:.1f}, best of {len(times)}; so far {before:.1f}"
            )
    return chosen


def write_table(path: Path, architecture: str, found: Table, where: str) -> None:
    """Write kernels/tuned.py with `found` for `architecture` and what it already held for others. `where`: what it was timed on."""
    table = {**tuned.TUNED, architecture: {**tuned.TUNED.get(architecture, {}), **found}}
    lines = [
        '"""Launch parameters found by tools/tune_kernels.py: {architecture: {(operation, bucket of shapes, bytes): parameters}}.',
        "",
        f"Last entry: {architecture}, timed on {where}.",
        '"""',
        "",
        "TUNED: dict[str, dict[tuple[str, int, int], tuple[int, ...]]] = {",
    ]
    for name, operations in sorted(table.items()):
        lines.append(f'    "{name}": {{')
        for (operation, bucket, itemsize), parameters in sorted(operations.items()):
            values = ", ".join(map(str, parameters)) + ("," if len(parameters) == 1 else "")
            lines.append(f'        ("{operation}", {bucket}, {itemsize}): ({values}),')
        lines.append("    },")
    path.write_text("\n".join([*lines, "}"]) + "\n")
