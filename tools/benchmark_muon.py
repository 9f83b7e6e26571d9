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
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from megatron_completep.benchmarks.muon_benchmark import measure
from megatron_completep.command_line import Parser, file_to_read, whole
from megatron_completep.config import load_config
from megatron_completep.errors import exit_on_user_error
from megatron_completep.parallel.context import choose_device
from megatron_completep.run.precision import use_threads
from megatron_completep.training.build import device_name


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("config", type=file_to_read, metavar="CONFIG", help="a run's YAML file")
    parser.add_overrides()
    parser.add_argument(
        "--rounds", type=whole(1, 10**4), default=20, help="timed steps of each (default: 20)"
    )
    parser.add_argument(
        "--json", action="store_true", help="one object on stdout, the log on stderr"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    config = load_config(arguments.config, arguments.overrides)
    device = choose_device(config.training.device, 0)
    threads = use_threads(config.training.cpu_threads, 1)
    place = device_name(device)
    if device.type == "cpu":
        place += f", {threads} threads"
    print(
        f"{place}, torch {torch.__version__}; {arguments.rounds} rounds",
        file=sys.stderr,
        flush=True,
    )

    # An interval over rounds needs two of them at least.
    cost = measure(config, device, max(2, arguments.rounds))
    if arguments.json:
        print(json.dumps({"device": place, "torch": torch.__version__, **asdict(cost)}))
    else:
        print(cost)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
