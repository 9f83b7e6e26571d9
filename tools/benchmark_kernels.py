"""Measure every fused kernel on this machine's GPU, beside its byte floor, a copy, and every baseline there is.

Example:

    python tools/benchmark_kernels.py                                # docs/benchmarks/<device>/kernels.{json,md,png}
    python tools/benchmark_kernels.py --rows 8192 --hidden 4096 --seconds 60 --out /tmp/report

Baselines: eager torch, torch.compile, torch's fused AdamW; Liger, quack, Transformer Engine and apex where installed. With
`--device cpu` tiny shapes run through the CPU path: that tests this program, and its times mean nothing.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_completep.benchmarks.kernel_benchmark import SMOKE, Plan, as_json, run
from megatron_completep.benchmarks.kernel_report import folder_name, versions, write_report
from megatron_completep.command_line import Parser, real, whole
from megatron_completep.errors import UserError, exit_on_user_error
from megatron_completep.outputs import Output, check_outputs


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: a trial of the program on tiny shapes",
    )
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
    plan = SMOKE if arguments.device == "cpu" else Plan()
    rows, hidden = tuple(arguments.rows or plan.rows), tuple(arguments.hidden or plan.hidden)
    plan = dataclasses.replace(plan, rows=rows, hidden=hidden)
    if arguments.seconds is not None:
        plan = dataclasses.replace(plan, seconds=arguments.seconds)
    return dataclasses.replace(plan, with_compile=False) if arguments.no_compile else plan


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "the kernel benchmark needs a GPU, and torch sees none. Run it on a machine with one, or try it with --device cpu."
        )
    device = torch.device(arguments.device)
    plan = chosen_plan(arguments)
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else "cpu (a trial, not a measurement)"
    )
    folder = arguments.out or Path(__file__).resolve().parents[
        1
    ] / "docs" / "benchmarks" / folder_name(name)
    check_outputs([Output("--out", folder, folder=True)])
    found, left_out = run(plan, device, lambda line: print(line, file=sys.stderr, flush=True))
    setting = {"device": name, "dtype": str(plan.dtype).removeprefix("torch."), **versions()}
    paths = write_report(found, left_out, setting, folder)
    print(f"wrote {', '.join(str(path) for path in paths)}", file=sys.stderr)
    if arguments.json:
        print(
            json.dumps({"setting": setting, "measurements": as_json(found), "left_out": left_out})
        )
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
