"""Time candidate launch parameters of every kernel on the GPU at hand, and write the best.

They are written into the launch table, kernels/tuned.py.
"""

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
Key = tuple[str, int, int]  # operation, bucket of shapes, bytes of the dtype
Parameters = tuple[int, ...]
Table = dict[Key, Parameters]


@dataclass(frozen=True)
class Choice:
    """The best parameters of one entry of the launch table.

    time: geometric mean of microseconds over the sizes. time_before: the same with today's
    parameters.
    """

    parameters: Parameters
    time: float
    time_before: float


@contextmanager
def launch_parameters(architecture: str, key: Key, parameters: Parameters) -> Iterator[None]:
    """Let one entry of the launch table be `parameters` inside the block."""
    entries = tuned.TUNED.setdefault(architecture, {})
    parameters_before = entries.get(key)
    entries[key] = parameters
    launch.forget()  # launches cache what they read from the table
    try:
        yield
    finally:
        if parameters_before is None:
            del entries[key]
        else:
            entries[key] = parameters_before
        # An empty entry of an architecture would be written into the table.
        if not entries:
            del tuned.TUNED[architecture]
        launch.forget()


def median_microseconds(work: Work) -> float:
    """Median time of a call on the GPU, its cache cleared before each repetition."""
    from triton.testing import do_bench

    milliseconds: float = do_bench(work, warmup=10, rep=40, quantiles=[0.5])
    return 1e3 * milliseconds


def launches_instead(architecture: str) -> Callable[[Work], float]:
    """A clock for a dry run on `meta` tensors: it takes the number of programs for the time.

    Nothing is launched.
    """

    def count_programs(work: Work) -> float:
        launches = record(work, architecture)
        return float(sum(math.prod(launched.grid) for launched in launches))

    return count_programs


def _mean_time(tunable: Tunable, time: Callable[[Work], float]) -> float:
    """Geometric mean over the sizes of a tunable, so that no size outweighs the others."""
    return statistics.geometric_mean([time(prepare()) for prepare in tunable.sizes])


def _candidate_times(
    architecture: str, tunable: Tunable, time: Callable[[Work], float], say: Callable[[str], None]
) -> dict[Parameters, float]:
    """The mean time of every candidate that can run."""
    times = {}
    for candidate in tunable.candidates:
        try:
            with launch_parameters(architecture, tunable.key, candidate):
                times[candidate] = _mean_time(tunable, time)
        # A candidate may need more registers or shared memory than this GPU has.
        except Exception as error:
            message = f"{tunable.name} {candidate}: left out: {type(error).__name__}: {error}"
            say(message.splitlines()[0])
    return times


def tune(
    architecture: str,
    tunables: Iterable[Tunable],
    time: Callable[[Work], float],
    say: Callable[[str], None],
) -> dict[Key, Choice]:
    """The best candidate of each tunable: the smallest geometric mean over its sizes.

    A candidate that cannot run is reported and left out. time: microseconds of a call.
    """
    choices = {}
    for tunable in tunables:
        times = _candidate_times(architecture, tunable, time, say)
        if not times:
            continue
        best = min(times, key=lambda candidate: times[candidate])
        # Today's parameters are timed under the same conditions as the candidates.
        time_before = _mean_time(tunable, time)
        choices[tunable.key] = Choice(best, times[best], time_before)
        say(
            f"{tunable.name}: {best} {times[best]:.1f}, "
            f"best of {len(times)}; so far {time_before:.1f}"
        )
    return choices


def write_table(path: Path, architecture: str, parameters_by_key: Table, where: str) -> None:
    """Write the launch table with these entries of `architecture`.

    Entries of other architectures and operations are kept. where: what the entries were timed on.
    """
    entries = {**tuned.TUNED.get(architecture, {}), **parameters_by_key}
    table = {**tuned.TUNED, architecture: entries}
    lines = [
        '"""Launch parameters found by tools/tune_kernels.py.',
        "",
        "    {architecture: {(operation, bucket of shapes, bytes of the dtype): parameters}}",
        "",
        f"Last entry: {architecture}, timed on {where}.",
        '"""',
        "",
        "TUNED: dict[str, dict[tuple[str, int, int], tuple[int, ...]]] = {",
    ]
    for name, operations in sorted(table.items()):
        lines.append(f'    "{name}": {{')
        for (operation, bucket, itemsize), parameters in sorted(operations.items()):
            # Python prints a tuple as the formatter would write it: (256,) and (8, 4).
            lines.append(f'        ("{operation}", {bucket}, {itemsize}): {parameters},')
        lines.append("    },")
    path.write_text("\n".join([*lines, "}"]) + "\n")
