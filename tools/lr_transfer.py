"""Tune a small model and carry its learning rate to large ones: sweep, report, plan.

Example, the proxy of configs/quickstart.yaml over four depths, three seeds, half-octave steps from
2^-10 to 2^-5:

    python tools/lr_transfer.py sweep configs/quickstart_proxy.yaml --out runs/transfer \
--depths 2,4,8,16 --lr -10:-5:2
    python tools/lr_transfer.py report runs/transfer
    python tools/lr_transfer.py plan runs/transfer configs/quickstart.yaml --to configs/tuned.yaml

A sweep that was interrupted goes on where it stopped when it is started again. Exit code 0; 2 for
bad input.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_completep.command_line import (
    Parser,
    file_to_read,
    folder_to_read,
    list_of,
    one_of,
    real,
    whole,
)
from megatron_completep.config import load_config
from megatron_completep.errors import ConfigError, exit_on_user_error, when_interrupted
from megatron_completep.instruments import sweep
from megatron_completep.instruments.lr_transfer_answer import PROXY
from megatron_completep.instruments.lr_transfer_plan import plan as make_plan
from megatron_completep.instruments.lr_transfer_report import report as make_report
from megatron_completep.instruments.trial import PARAMETERIZATIONS
from megatron_completep.outputs import Output, check_outputs
from megatron_completep.parallel.context import choose_device

# The two agree on the upper end: 2^10 = 1024.
EXPONENTS = real(at_least=-60, at_most=10)
RATE = real(above=0, at_most=1024)


def rates(text: str) -> list[float]:
    """'-10:-5:2' (exponents of two, points an octave), or learning rates: '0.001,0.002'."""
    if ":" not in text:
        return list_of(RATE)(text)
    fields = text.split(":")
    if len(fields) > 3:
        raise argparse.ArgumentTypeError(
            "give LOW:HIGH:N, exponents of two and points an octave, such as -10:-5:2."
        )
    # N may be left out, and is then 2.
    low = EXPONENTS(fields[0])
    high = EXPONENTS(fields[1])
    per_octave = whole(1, 100)(fields[2]) if len(fields) == 3 else 2
    if low > high:
        raise argparse.ArgumentTypeError(
            f"LOW = {fields[0]} is above HIGH = {fields[1]}. Swap them."
        )
    return sweep.octaves(low, high, per_octave)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_sweep(commands)
    _add_report(commands)
    _add_plan(commands)
    return parser.parse_args(argv)


def _add_sweep(commands: Any) -> None:
    command = commands.add_parser("sweep", help="train every point of a grid")
    command.add_argument("config", type=file_to_read, help="YAML file of the proxy")
    command.add_overrides()
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="where points are kept; may hold a sweep already",
    )
    command.add_argument(
        "--lr",
        type=rates,
        required=True,
        metavar="LOW:HIGH:N",
        help="exponents of two and points an octave, or a list of values",
    )
    _add_axes(command)
    command.add_argument("--seeds", type=whole(1, 1000), default=3, help="repetitions (default: 3)")
    command.add_argument(
        "--workers", type=whole(1, 1024), help="runs at once (default: one a core, or six a GPU)"
    )
    command.add_argument(
        "--slurm",
        metavar="KEY=VALUE,...",
        help="submit to Slurm with these options of submitit, "
        "such as timeout_min=60,gpus_per_node=1",
    )
    _add_json(command)


def _add_axes(command: Parser) -> None:
    """The axes of the grid beside the learning rate; an empty list is the configuration's value."""
    command.add_argument(
        "--depths",
        type=list_of(whole(1, 10**5)),
        default=[],
        help="layers, such as 2,8,32 (default: the configuration's)",
    )
    command.add_argument(
        "--widths",
        type=list_of(whole(1, 10**6)),
        default=[],
        help="hidden sizes (default: the configuration's)",
    )
    command.add_argument(
        "--experts",
        type=list_of(whole(1, 10**6)),
        default=[],
        help="numbers of experts, such as 8,32, of which a token goes to the configuration's share "
        "(default: the configuration's)",
    )
    command.add_argument(
        "--parameterizations",
        type=list_of(one_of(PARAMETERIZATIONS)),
        default=["completep"],
        help="of completep,alpha_0.5,mup,sp",
    )
    command.add_argument(
        "--weight-decays",
        type=list_of(real(at_least=0)),
        default=[],
        help="base weight decays (default: the configuration's)",
    )
    command.add_argument(
        "--init-stds",
        type=list_of(real(above=0)),
        default=[],
        help="base initial standard deviations (default: the configuration's)",
    )
    command.add_argument(
        "--train-steps",
        type=list_of(whole()),
        default=[],
        help="lengths of runs (default: the configuration's); savings need two",
    )


def _add_report(commands: Any) -> None:
    command = commands.add_parser(
        "report", help="optima, drift, regret and savings of a sweep, as HTML, PNG and JSON"
    )
    command.add_argument("folder", type=folder_to_read, help="the sweep's folder")
    command.add_argument(
        "--baseline",
        choices=tuple(PARAMETERIZATIONS),
        default="mup",
        help="parameterization that savings are counted against (default: mup)",
    )
    _add_json(command)


def _add_plan(commands: Any) -> None:
    command = commands.add_parser(
        "plan", help="write the target's configuration with the sweep's best values"
    )
    command.add_argument("folder", type=folder_to_read, help="the sweep's folder")
    command.add_argument("target", type=file_to_read, help="YAML file of the target")
    command.add_overrides("settings that replace the target's")
    command.add_argument(
        "--to", type=Path, required=True, metavar="FILE", help="the YAML file to write"
    )
    command.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    command.add_argument(
        "--scale-batch",
        action="store_true",
        help="scale to the target's batch and duration as Complete(d)P does",
    )
    _add_json(command)


def _add_json(command: Parser) -> None:
    command.add_argument(
        "--json", action="store_true", help="one object on stdout, the log on stderr"
    )


def slurm_options(words: str) -> dict[str, int | str]:
    """'timeout_min=60,partition=a' -> {"timeout_min": 60, "partition": "a"}.

    Raises ConfigError for a word that is no pair.
    """
    options: dict[str, int | str] = {}
    for pair in words.split(","):
        if not pair:
            continue
        key, equals, setting = pair.partition("=")
        if not equals:
            raise ConfigError(
                f"--slurm {words}: write KEY=VALUE pairs, such as timeout_min=60,gpus_per_node=1."
            )
        # submitit takes minutes and counts as numbers, and names as words.
        options[key] = int(setting) if setting.isdigit() else setting
    return options


def run_sweep(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Train every point that has no result yet, here or under Slurm."""
    folder: Path = arguments.out
    check_outputs([Output("--out", folder, folder=True)])
    config = load_config(arguments.config, arguments.overrides)
    grid = sweep.Grid(
        arguments.lr,
        arguments.depths,
        arguments.widths,
        arguments.parameterizations,
        arguments.weight_decays,
        arguments.init_stds,
        arguments.train_steps,
        arguments.seeds,
        arguments.experts,
    )
    points = grid.points(config)
    # Before the first point is trained: `report` finds by it even those of a sweep that was ended.
    sweep.save_grid(grid, config, folder)

    if arguments.slurm is not None:
        options = slurm_options(arguments.slurm)
        jobs = sweep.run_slurm(points, folder, options, config.training.device)
        say(f"{len(jobs)} jobs submitted; report when they are done")
    else:
        device = choose_device(config.training.device, 0).type
        workers = arguments.workers or sweep.default_workers(device)
        with when_interrupted(
            "finished points are kept; the same command goes on with the others."
        ):
            sweep.run_local(points, folder, workers, device, say)
        next_command = ["python", "tools/lr_transfer.py", "report", str(folder)]
        say(f"next: {shlex.join(next_command)}")

    # Under Slurm the jobs have only been submitted, so that their points are still missing.
    missing = sweep.missing(points, folder)
    return {"points": len(points), "missing": len(missing), "folder": str(folder)}


def run_plan(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Write the target's configuration with the best values of the sweep."""
    folder: Path = arguments.folder
    # --overwrite replaces another plan, but never what the plan is made from.
    inputs = [arguments.target, folder / "sweep.json", folder / PROXY]
    check_outputs([Output("--to", arguments.to)], inputs, arguments.overwrite)
    target = load_config(arguments.target, arguments.overrides)
    return make_plan(folder, target, arguments.to, arguments.scale_batch, say)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    # With --json, stdout holds one object and nothing else.
    log = sys.stderr if arguments.json else sys.stdout

    def say(line: str) -> None:
        print(line, file=log, flush=True)

    if arguments.command == "sweep":
        result = run_sweep(arguments, say)
    elif arguments.command == "report":
        result = make_report(arguments.folder, arguments.baseline, say)
    else:
        result = run_plan(arguments, say)
    if arguments.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
