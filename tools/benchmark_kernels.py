"""Measure every fused kernel on this machine's GPU, beside its byte floor, a copy and baselines.

Example, with the report in docs/benchmarks/<device>/kernels.{json,md,png}, then in another folder:

    python tools/benchmark_kernels.py
    python tools/benchmark_kernels.py --rows 8192 --hidden 4096 --seconds 60 --out /tmp/report

Baselines: eager torch, torch.compile, torch's fused AdamW; Liger, quack, Transformer Engine and
apex where installed. With `--device cpu` tiny shapes run through the CPU path: that tests this
program, and its times mean nothing.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_completep.benchmarks.kernel_benchmark import SMOKE, Plan, as_json, run
from megatron_completep.benchmarks.kernel_report import folder_name, versions, write_report
from megatron_completep.command_line import Parser, real, whole
from megatron_completep.errors import UserError, exit_on_user_error
from megatron_completep.outputs import Output, check_outputs

BENCHMARKS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: a trial of the program on tiny shapes",
    )
    # Without a value here, an option leaves what the device's plan says.
    parser.add_argument(
        "--rows", type=whole(1, 10**6), nargs="+", help="tokens (default: 2048 to 16384)"
    )
    parser.add_argument(
        "--hidden", type=whole(1, 10**6), nargs="+", help="hidden sizes (default: 768 to 8192)"
    )
    parser.add_argument(
        "--seconds",
        type=real(at_least=0, at_most=10**6),
        help="stop starting new measurements after this long (default: 190)",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--out", type=Path, help="folder of the report (default: docs/benchmarks/<device>)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout as well"
    )
    return parser.parse_args(argv)


def chosen_plan(arguments: argparse.Namespace) -> Plan:
    """The plan of the device, with the options that were given in place of its values."""
    changes: dict[str, Any] = {}
    if arguments.rows:
        changes["rows"] = tuple(arguments.rows)
    if arguments.hidden:
        changes["hidden"] = tuple(arguments.hidden)
        changes["compiled_hidden"] = tuple(arguments.hidden)
    if arguments.seconds is not None:
        changes["seconds"] = arguments.seconds
    if arguments.no_compile:
        changes["with_compile"] = False
    plan = SMOKE if arguments.device == "cpu" else Plan()
    return dataclasses.replace(plan, **changes)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "the kernel benchmark needs a GPU, and torch sees none. "
            "Run it on a machine with one, or try it with --device cpu."
        )
    device = torch.device(arguments.device)
    device_name = "cpu (a trial, not a measurement)"
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name()
    folder = arguments.out or BENCHMARKS / folder_name(device_name)
    # Checked before the minutes of work whose result would be lost.
    check_outputs([Output("--out", folder, folder=True)])

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    plan = chosen_plan(arguments)
    measurements, left_out = run(plan, device, say)
    dtype_name = str(plan.dtype).removeprefix("torch.")
    setting = {"device": device_name, "dtype": dtype_name, **versions()}
    paths = write_report(measurements, left_out, setting, folder)
    say(f"wrote {', '.join(str(path) for path in paths)}")
    if arguments.json:
        rows = as_json(measurements)
        print(json.dumps({"setting": setting, "measurements": rows, "left_out": left_out}))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
