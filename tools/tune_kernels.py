"""Choose the launch parameters of every kernel on the GPU at hand, for the launch table.

Example:

    python tools/tune_kernels.py                         # print the best of each entry
    python tools/tune_kernels.py --write                 # and write them into kernels/tuned.py
    python tools/tune_kernels.py --only norm_backward --hidden 4096 --write
    python tools/tune_kernels.py --dry-run --arch sm_90  # without a GPU: what would be tried

The table is to be committed. Nothing is tuned while training: every rank and every restart reads
the same table, so all launch the same reduction order. A dry run times and writes nothing.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_completep.benchmarks.tune_kernels import (
    Choice,
    Key,
    launches_instead,
    median_microseconds,
    tune,
    write_table,
)
from megatron_completep.benchmarks.tuning_cases import Sweep, Tunable, tunables
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


def check_together(arguments: argparse.Namespace) -> None:
    """Refuse to time without a GPU, and to write what was not timed."""
    if not arguments.dry_run and not torch.cuda.is_available():
        raise ConfigError(
            "no GPU is visible to torch: launch parameters can only be chosen on the GPU they are "
            "for. Or try --dry-run."
        )
    if arguments.dry_run and arguments.write:
        raise ConfigError(
            "--dry-run times nothing, so there is nothing to --write. Leave one of them out."
        )


def tuned_entries(
    arguments: argparse.Namespace, device: torch.device, architecture: str
) -> list[Tunable]:
    """The entries of the table that are asked for. Raises ConfigError where --only names none."""
    # The dtype decides which entries of the table are tuned: they are kept by its bytes.
    sweep = Sweep(dtype=getattr(torch, arguments.dtype))
    if arguments.hidden:
        sweep = dataclasses.replace(sweep, hidden=tuple(arguments.hidden))
    entries = []
    for entry in tunables(sweep, device, architecture):
        operation, _, _ = entry.key
        if not arguments.only or operation in arguments.only:
            entries.append(entry)
    if not entries:
        raise ConfigError(
            f"--only {' '.join(arguments.only)}: no such operation in the table. "
            "See kernels/launch.py."
        )
    return entries


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    check_together(arguments)
    if arguments.dry_run:
        # Tensors without data: launches are recorded and counted, not run.
        device = torch.device("meta")
        architecture = arguments.arch
        device_name = "a dry run"
        clock = launches_instead(architecture)
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        architecture = launch.architecture(device)
        device_name = torch.cuda.get_device_name(device)
        clock = median_microseconds

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    entries = tuned_entries(arguments, device, architecture)
    choices = tune(architecture, entries, clock, say=say)

    if arguments.write:
        table = {key: choice.parameters for key, choice in choices.items()}
        timed_on = f"{device_name}, torch {torch.__version__}"
        write_table(Path(tuned.__file__), architecture, table, timed_on)
    if arguments.json:
        shapes = [{"entry": key, **dataclasses.asdict(choice)} for key, choice in choices.items()]
        content = {"device": device_name, "architecture": architecture, "shapes": shapes}
        print(json.dumps(content))
        return 0
    if arguments.dry_run:
        candidates = sum(len(entry.candidates) for entry in entries)
        print(
            f"a dry run for {architecture}: {len(choices)} entries, {candidates} candidates; "
            "nothing was timed"
        )
        return 0
    for key, choice in choices.items():
        print(describe(key, choice))
    return 0


def describe(key: Key, choice: Choice) -> str:
    """One line for a person: the parameters of an entry, and what they gain."""
    operation, bucket, itemsize = key
    parameters = ", ".join(map(str, choice.parameters))
    speedup = choice.time_before / choice.time
    entry = f"{operation} {bucket} ({itemsize} bytes)"
    return f"{entry}: {parameters}; {speedup:.2f}x as fast as so far"


if __name__ == "__main__":
    exit_on_user_error(main)
