"""Tune every entry of the launch table on `meta` tensors with a clock of our own,
write the table, launch from it; prints JSON.

A program of its own: a process that has chosen Triton's interpreter cannot intercept launches. The
clock prefers one candidate of each entry, by what is launched under it.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch

from megatron_completep.benchmarks import tune_kernels
from megatron_completep.benchmarks.tuning_cases import Sweep, tunables
from megatron_completep.kernels import launch, tuned
from megatron_completep.kernels.ahead_of_time import record

ARCHITECTURE = sys.argv[1]
TABLE = Path(sys.argv[2])
SWEEP = Sweep(hidden=(768, 4096), rows=(4096,), vocabularies=(50_432,), parameters=(1 << 20,))


def launched(work):
    """Name, grid and parameters of the first launch:
    a reduction after it has an entry of its own.
    """
    first = record(work, ARCHITECTURE)[0]
    return first.name, first.grid, sorted((k, str(v)) for k, v in first.parameters.items())


def launched_now(tunable):
    return launched(tunable.sizes[0]())


def main():
    entries = list(tunables(SWEEP, torch.device("meta"), ARCHITECTURE))
    wanted, before = {}, {entry.key: launched_now(entry) for entry in entries}
    for entry in entries:
        with tune_kernels.launch_parameters(
            ARCHITECTURE, entry.key, entry.candidates[len(entry.candidates) // 2]
        ):
            wanted[entry.key] = launched_now(entry)
    asked: set[tuple[str, int, int]] = set()
    true_tuned_or = launch.tuned_or

    def spy(default, architecture, operation, bucket, itemsize):
        asked.add((operation, bucket, itemsize))
        return true_tuned_or(default, architecture, operation, bucket, itemsize)

    launch.tuned_or = spy
    lines: list[str] = []
    chosen = {}
    for entry in entries:
        clock = lambda work, entry=entry: 1.0 if launched(work) == wanted[entry.key] else 2.0  # noqa: E731
        chosen |= tune_kernels.tune(ARCHITECTURE, [entry], clock, lines.append)
    launch.tuned_or = true_tuned_or
    untouched = not tuned.TUNED.get(ARCHITECTURE)

    tune_kernels.write_table(
        TABLE, ARCHITECTURE, {key: choice.parameters for key, choice in chosen.items()}, "a test"
    )
    spec = importlib.util.spec_from_file_location("written", TABLE)
    written = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(written)
    tuned.TUNED.update(written.TUNED)
    launch.forget()
    answer = {
        "entries": [list(entry.key) for entry in entries],
        "asked": sorted({operation for operation, _, _ in asked}),
        "launched as wanted": [
            list(entry.key) for entry in entries if launched_now(entry) == wanted[entry.key]
        ],
        "launched as before": [
            list(entry.key) for entry in entries if launched_now(entry) == before[entry.key]
        ],
        "wanted what was launched before": [
            list(entry.key) for entry in entries if wanted[entry.key] == before[entry.key]
        ],
        "table restored": untouched,
        "left out": [line for line in lines if "left out" in line],
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
