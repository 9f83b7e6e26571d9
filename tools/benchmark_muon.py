"""Time a step with Muon beside the same step with a plain implementation of the update.

Example:

    python tools/benchmark_muon.py configs/quickstart.yaml optimizer.type=muon \\
        'optimizer.muon={base_lr: 0.02}'

The model and the batch are the configuration's; tokens are random and no data file is opened. The
two take turns in one process. The plain update has every logical matrix as a parameter of its own,
in the same precision. Printed: the processor time of both steps, their ratio, and the share that
orthogonal factors take.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_completep.benchmarks.muon_benchmark import measure
from megatron_completep.benchmarks.run_benchmark import parse_arguments as parse_shared
from megatron_completep.benchmarks.run_benchmark import run_benchmark
from megatron_completep.errors import exit_on_user_error


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return parse_shared(__doc__, "timed steps of each", argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    run_benchmark(parse_arguments(argv), measure)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
