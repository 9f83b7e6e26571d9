"""Tune a small model and carry its learning rate to large ones: sweep, report, plan.

Example, the proxy of configs/quickstart.yaml over four depths, three seeds, half-octave steps from 2^-10 to 2^-5:

    python tools/lr_transfer.py sweep configs/quickstart_proxy.yaml --out runs/transfer --depths 2,4,8,16 --lr -10:-5:2
    python tools/lr_transfer.py report runs/transfer
    python tools/lr_transfer.py plan runs/transfer configs/quickstart.yaml --to configs/tuned.yaml

A sweep that was interrupted goes on where it stopped when it is started again. Exit code 0; 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

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

EXPONENTS = real(at_least=-60, at_most=10)
RATE = real(above=0, at_most=1024)


def rates(text: str) -> list[float]:
    """'-10:-5:2' (exponents of two, points an octave), or learning rates: '0.001,0.002'."""
    if ":" not in text:
        return list_of(RATE)(text)
    low, high, *rest = text.split(":")
    if len(rest) > 1:
        raise argparse.ArgumentTypeError(
            "give LOW:HIGH:N, exponents of two and points an octave, such as -10:-5:2."
        )
    first, last, per_octave = EXPONENTS(low), EXPONENTS(high), whole(1, 100)(rest[0]) if rest else 2
    if first > last:
        raise argparse.ArgumentTypeError(f"LOW = {low} is above HIGH = {high}. Swap them.")
    return sweep.octaves(first, last, per_octave)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("sweep", help="train every point of a grid")
    run.add_argument("config", type=file_to_read, help="YAML file of the proxy")
    run.add_overrides()
    run.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="where points are kept; may hold a sweep already",
    )
    run.add_argument(
        "--lr",
        type=rates,
        required=True,
        metavar="LOW:HIGH:N",
        help="exponents of two and points an octave, or a list of values",
    )
    run.add_argument(
        "--depths",
        type=list_of(whole(1, 10**5)),
        default=[],
        help="layers, such as 2,8,32 (default: the configuration's)",
    )
    run.add_argument(
        "--widths",
        type=list_of(whole(1, 10**6)),
        default=[],
        help="hidden sizes (default: the configuration's)",
    )
    run.add_argument(
        "--parameterizations",
        type=list_of(one_of(PARAMETERIZATIONS)),
        default=["completep"],
        help="of completep,alpha_0.5,mup,sp",
    )
    run.add_argument(
        "--weight-decays",
        type=list_of(real(at_least=0)),
        default=[],
        help="base weight decays (default: the configuration's)",
    )
    run.add_argument(
        "--init-stds",
        type=list_of(real(above=0)),
        default=[],
        help="base initial standard deviations (default: the configuration's)",
    )
    run.add_argument(
        "--train-steps",
        type=list_of(whole()),
        default=[],
        help="lengths of runs (default: the configuration's); savings need two",
    )
    run.add_argument("--seeds", type=whole(1, 1000), default=3, help="repetitions (default: 3)")
    run.add_argument(
        "--workers", type=whole(1, 1024), help="runs at once (default: one a core, or six a GPU)"
    )
    run.add_argument(
        "--slurm",
        metavar="KEY=VALUE,...",
        help="submit to Slurm with these options of submitit, such as timeout_min=60,gpus_per_node=1",
    )
    run.add_argument("--json", action="store_true", help="one object on stdout, the log on stderr")
    report = commands.add_parser(
        "report", help="optima, drift, regret and savings of a sweep, as HTML, PNG and JSON"
    )
    report.add_argument("folder", type=folder_to_read, help="the sweep's folder")
    report.add_argument(
        "--baseline",
        choices=tuple(PARAMETERIZATIONS),
        default="mup",
        help="parameterization that savings are counted against (default: mup)",
    )
    report.add_argument(
        "--json", action="store_true", help="one object on stdout, the log on stderr"
    )
    plan = commands.add_parser(
        "plan", help="write the target's configuration with the sweep's best values"
    )
    plan.add_argument("folder", type=folder_to_read, help="the sweep's folder")
    plan.add_argument("target", type=file_to_read, help="YAML file of the target")
    plan.add_overrides("settings that replace the target's")
    plan.add_argument(
        "--to", type=Path, required=True, metavar="FILE", help="the YAML file to write"
    )
    plan.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    plan.add_argument(
        "--scale-batch",
        action="store_true",
        help="scale to the target's batch and duration as Complete(d)P does",
    )
    plan.add_argument("--json", action="store_true", help="one object on stdout, the log on stderr")
    return parser.parse_args(argv)


def slurm_options(text: str) -> dict[str, int | str]:
    pairs = [part.partition("=") for part in text.split(",") if part]
    if any(not equals for _, equals, _ in pairs):
        raise ConfigError(
            f"--slurm {text}: write KEY=VALUE pairs, such as timeout_min=60,gpus_per_node=1."
        )
    return {key: int(value) if value.isdigit() else value for key, _, value in pairs}


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    log = sys.stderr if arguments.json else sys.stdout

    def say(text: str) -> None:
        print(text, file=log, flush=True)

    if arguments.command == "sweep":
        check_outputs([Output("--out", arguments.out, folder=True)])
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
        )
        points = grid.points(config)
        sweep.save_grid(grid, config, arguments.out)
        if arguments.slurm is not None:
            jobs = sweep.run_slurm(
                points, arguments.out, slurm_options(arguments.slurm), config.training.device
            )
            say(f"{len(jobs)} jobs submitted; report when they are done")
        else:
            device = choose_device(config.training.device, 0).type
            with when_interrupted(
                "finished points are kept; the same command goes on with the others."
            ):
                sweep.run_local(
                    points,
                    arguments.out,
                    arguments.workers or sweep.default_workers(device),
                    device,
                    say,
                )
            say(
                f"next: {shlex.join(['python', 'tools/lr_transfer.py', 'report', str(arguments.out)])}"
            )
        result = {
            "points": len(points),
            "missing": len(sweep.missing(points, arguments.out)),
            "folder": str(arguments.out),
        }
    elif arguments.command == "report":
        result = make_report(arguments.folder, arguments.baseline, say)
    else:
        check_outputs(
            [Output("--to", arguments.to)],
            [arguments.target, arguments.folder / "sweep.json", arguments.folder / PROXY],
            arguments.overwrite,
        )
        result = make_plan(
            arguments.folder,
            load_config(arguments.target, arguments.overrides),
            arguments.to,
            arguments.scale_batch,
            say,
        )
    if arguments.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
