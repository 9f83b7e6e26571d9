"""Test and time the kernels and the training step on the GPU at hand.

Example, what `make gpu-report` runs:

    python tools/gpu_report.py

writes report.json, report.md and kernels.png under docs/benchmarks/<device>, in less than nine
minutes and without a network.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import triton

from megatron_completep.benchmarks.gpu_report import describe_device, make_report, passed
from megatron_completep.command_line import Parser
from megatron_completep.errors import ConfigError, exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object on stdout: the folder and whether all parts passed",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    if not torch.cuda.is_available():
        raise ConfigError("no GPU is visible to torch: this report is for a machine with one.")
    # Its parts are programs of this checkout, which need not be installed. Unbuffered, the log of
    # one that runs out of time is complete.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    log = sys.stderr if arguments.json else sys.stdout

    def say(line: str) -> None:
        print(line, file=log, flush=True)

    device = describe_device(torch, triton.__version__)
    folder = make_report(ROOT, environment, device, say)
    if arguments.json:
        print(json.dumps({"folder": str(folder), "passed": passed(folder)}))
    else:
        print(f"written to {folder}")
    return 0 if passed(folder) else 1


if __name__ == "__main__":
    exit_on_user_error(main)
