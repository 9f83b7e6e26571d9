"""Time the parameterization telemetry of a configuration beside its training step, in one run.

Example:

    python tools/benchmark_telemetry.py configs/quickstart.yaml training.cpu_threads=2

The model and the batch are the configuration's; tokens are random and no data file is opened. The
two take turns in one process. Printed: what one look at the parameterization costs, as a share of
the training time at logging.parameterization_interval.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_completep.benchmarks.run_benchmark import parse_arguments as parse_shared
from megatron_completep.benchmarks.run_benchmark import run_benchmark
from megatron_completep.benchmarks.telemetry_benchmark import measure
from megatron_completep.errors import exit_on_user_error


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return parse_shared(__doc__, "timed steps and looks", argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    run_benchmark(parse_arguments(argv), measure)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
