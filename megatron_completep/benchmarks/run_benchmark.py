"""The program of a benchmark that takes a run's configuration and times rounds of its steps."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from megatron_completep.command_line import Parser, file_to_read, whole
from megatron_completep.config import load_config
from megatron_completep.config.schema import Config
from megatron_completep.parallel.context import choose_device
from megatron_completep.run.precision import use_threads
from megatron_completep.training.build import device_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# (the configuration, the device, rounds) -> the costs, which print as lines.
Measure = Callable[[Config, torch.device, int], "DataclassInstance"]


def parse_arguments(
    description: str | None, rounds_help: str, argv: Sequence[str] | None
) -> argparse.Namespace:
    """The command line that these benchmarks share."""
    parser = Parser(description)
    parser.add_argument("config", type=file_to_read, metavar="CONFIG", help="a run's YAML file")
    parser.add_overrides()
    parser.add_argument(
        "--rounds", type=whole(1, 10**4), default=20, help=f"{rounds_help} (default: 20)"
    )
    parser.add_argument(
        "--json", action="store_true", help="one object on stdout, the log on stderr"
    )
    return parser.parse_args(argv)


def run_benchmark(arguments: argparse.Namespace, measure: Measure) -> None:
    """Measure on the device that the configuration names, and print the costs."""
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
    costs = measure(config, device, max(2, arguments.rounds))
    if arguments.json:
        print(json.dumps({"device": place, "torch": torch.__version__, **asdict(costs)}))
    else:
        print(costs)
