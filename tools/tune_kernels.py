"""Choose the launch parameters of every kernel on the GPU at hand, and write them into the launch table.

Example:

    python tools/tune_kernels.py                          # print what was found
    python tools/tune_kernels.py --write                  # and put it into kernels/tuned.py, to be committed
    python tools/tune_kernels.py --only norm_backward --hidden 4096 --write
    python tools/tune_kernels.py --dry-run --arch sm_90   # without a GPU: what would be tried; nothing is timed or written

Nothing is tuned while training: every rank and every restart reads the same table, so all launch the same reduction order.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_completep.benchmarks.tune_kernels import (
    launches_instead,
    median_microseconds,
    tune,
    write_table,
)
from megatron_completep.benchmarks.tuning_cases import Sweep, tunables
from megatron_completep.command_line import Parser, whole
from megatron_completep.errors import ConfigError, exit_on_user_error
from megatron_completep.kernels import launch, tuned
from megatron_completep.kernels.ahead_of_time import ARCHITECTURES


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="OPERATION",
        help="these operations of the table (default: all)",
    )
    parser.add_argument(
        "--hidden", type=whole(1, 10**6), nargs="+", help="hidden sizes (default: 768 to 8192)"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the activations",
    )
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument(
        "--dry-run", action="store_true", help="walk through all candidates without a GPU"
    )
    parser.add_argument(
        "--arch",
        choices=ARCHITECTURES,
        default="sm_90",
        help="the architecture of a dry run (default: sm_90)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        raise ConfigError(
            "no GPU is visible to torch: launch parameters can only be chosen on the GPU they are for. Or try --dry-run."
        )
    if arguments.dry_run and arguments.write:
        raise ConfigError(
            "--dry-run times nothing, so there is nothing to --write. Leave one of them out."
        )
    device = (
        torch.device("meta")
        if arguments.dry_run
        else torch.device("cuda", torch.cuda.current_device())
    )
    architecture = arguments.arch if arguments.dry_run else launch.architecture(device)
    name = "a dry run" if arguments.dry_run else torch.cuda.get_device_name(device)
    sweep = Sweep(dtype=getattr(torch, arguments.dtype))
    if arguments.hidden:
        sweep = dataclasses.replace(sweep, hidden=tuple(arguments.hidden))
    entries = [
        t
        for t in tunables(sweep, device, architecture)
        if not arguments.only or t.key[0] in arguments.only
    ]
    if not entries:
        raise ConfigError(
            f"--only {' '.join(arguments.only)}: no such operation in the table. See kernels/launch.py."
        )
    clock = launches_instead(architecture) if arguments.dry_run else median_microseconds
    found = tune(
        architecture, entries, clock, say=lambda line: print(line, file=sys.stderr, flush=True)
    )
    if arguments.write:
        table = {key: choice.parameters for key, choice in found.items()}
        write_table(Path(tuned.__file__), architecture, table, f"{name}, torch {torch.__version__}")
    if arguments.dry_run and not arguments.json:
        print(
            f"a dry run for {architecture}: {len(found)} entries, {sum(len(t.candidates) for t in entries)} candidates; nothing was timed"
        )
        return 0
    if arguments.json:
        shapes = [{"entry": key, **dataclasses.asdict(choice)} for key, choice in found.items()]
        print(json.dumps({"device": name, "architecture": architecture, "shapes": shapes}))
        return 0
    for (operation, bucket, itemsize), choice in found.items():
        launched = ", ".join(map(str, choice.parameters))
        print(
            f"{operation} {bucket} ({itemsize} bytes): {launched}; {choice.time_before / choice.time:.2f}x as fast as so far"
        )
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
