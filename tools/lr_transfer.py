"""Tune a small model and carry its learning rate to large ones: sweep, report, plan.

Example, the proxy of configs/quickstart.yaml over four depths, three seeds, half-octave steps from 2^-10 to 2^-5:

    python tools/lr_transfer.py sweep configs/quickstart_proxy.yaml --out runs/transfer --depths 2,4,8,16 --lr=-10:-5:2
    python tools/lr_transfer.py report runs/transfer
    python tools/lr_transfer.py plan runs/transfer configs/quickstart.yaml --to configs/tuned.yaml

A sweep that was interrupted goes on where it stopped when it is started again. Exit code 0; 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from megatron_completep.analysis import sweep
from megatron_completep.analysis.lr_transfer_plan import plan as make_plan
from megatron_completep.analysis.lr_transfer_report import report as make_report
from megatron_completep.config import load_config
from megatron_completep.errors import ConfigError, exit_on_user_error
from megatron_completep.parallel.context import choose_device


def numbers(kind: type):
    """A parser of comma-separated numbers."""
    return lambda text: [kind(part) for part in text.split(",") if part]


def rates(text: str) -> list[float]:
    """'-10:-5:2' (exponents of two, points an octave), or learning rates: '0.001,0.002'."""
    if ":" not in text:
        return numbers(float)(text)
    low, high, per_octave = ([float(part) for part in text.split(":")] + [2.0])[:3]
    return sweep.octaves(low, high, int(per_octave))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("sweep", help="train every point of a grid")
    run.add_argument("config", help="YAML file of the proxy")
    run.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    run.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where points are kept; may hold a sweep already")
    run.add_argument(
        "--lr", type=rates, required=True, metavar="LOW:HIGH:N", help="exponents of two and points an octave, or a list of values"
    )
    run.add_argument("--depths", type=numbers(int), default=[], help="layers, such as 2,8,32 (default: the configuration's)")
    run.add_argument("--widths", type=numbers(int), default=[], help="hidden sizes (default: the configuration's)")
    run.add_argument("--parameterizations", type=numbers(str), default=["completep"], help="of completep,alpha_0.5,mup,sp")
    run.add_argument("--weight-decays", type=numbers(float), default=[], help="base weight decays (default: the configuration's)")
    run.add_argument("--init-stds", type=numbers(float), default=[], help="base initial standard deviations (default: the configuration's)")
    run.add_argument(
        "--train-steps", type=numbers(int), default=[], help="lengths of runs (default: the configuration's); savings need two"
    )
    run.add_argument("--seeds", type=int, default=3, help="repetitions (default: 3)")
    run.add_argument("--workers", type=int, help="runs at once (default: one a core, or six a GPU)")
    run.add_argument(
        "--slurm", metavar="KEY=VALUE,...", help="submit to Slurm with these options of submitit, such as timeout_min=60,gpus_per_node=1"
    )
    run.add_argument("--json", action="store_true", help="one object on stdout, the log on stderr")
    report = commands.add_parser("report", help="optima, drift, regret and savings of a sweep, as HTML, PNG and JSON")
    report.add_argument("folder", type=Path, help="the sweep's folder")
    report.add_argument("--baseline", default="mup", help="parameterization that savings are counted against (default: mup)")
    report.add_argument("--json", action="store_true", help="one object on stdout, the log on stderr")
    plan = commands.add_parser("plan", help="write the target's configuration with the sweep's best values")
    plan.add_argument("folder", type=Path, help="the sweep's folder")
    plan.add_argument("target", help="YAML file of the target")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the target's")
    plan.add_argument("--to", type=Path, required=True, metavar="FILE", help="the YAML file to write")
    plan.add_argument("--scale-batch", action="store_true", help="scale to the target's batch and duration as Complete(d)P does")
    plan.add_argument("--json", action="store_true", help="one object on stdout, the log on stderr")
    return parser.parse_args()


def slurm_options(text: str) -> dict[str, int | str]:
    pairs = [part.partition("=") for part in text.split(",") if part]
    if any(not equals for _, equals, _ in pairs):
        raise ConfigError(f"--slurm {text}: write KEY=VALUE pairs, such as timeout_min=60,gpus_per_node=1.")
    return {key: int(value) if value.isdigit() else value for key, _, value in pairs}


def main() -> int | None:
    arguments = parse_arguments()
    log = sys.stderr if arguments.json else sys.stdout

    def say(text: str) -> None:
        print(text, file=log, flush=True)

    if arguments.command == "sweep":
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
            jobs = sweep.run_slurm(points, arguments.out, slurm_options(arguments.slurm), config.training.device)
            say(f"{len(jobs)} jobs submitted; report when they are done")
        else:
            device = choose_device(config.training.device, 0).type
            sweep.run_local(points, arguments.out, arguments.workers or sweep.default_workers(device), device, say)
            say(f"next: {shlex.join(['python', 'tools/lr_transfer.py', 'report', str(arguments.out)])}")
        result = {"points": len(points), "missing": len(sweep.missing(points, arguments.out)), "folder": str(arguments.out)}
    elif arguments.command == "report":
        result = make_report(arguments.folder, arguments.baseline, say)
    else:
        result = make_plan(arguments.folder, load_config(arguments.target, arguments.overrides), arguments.to, arguments.scale_batch, say)
    if arguments.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
