"""Forecast a large run from small ones: plan, run, fit, predict.

Example, five rungs from the proxy's size to 1e14 FLOPs, for a target of 50 million parameters, with
muP as the control:

    python tools/ladder.py plan proxy.yaml --out runs/ladder --rungs 5 --to-flops 1e14 \
--target-parameters 5e7 --parameterizations completep,mup
    python tools/ladder.py run runs/ladder
    python tools/ladder.py fit runs/ladder
    python tools/ladder.py predict runs/ladder --parameters 2e8

A ladder that was interrupted goes on where it stopped when `run` is started again; --write-jobs
writes a Slurm array and a Kubernetes job in place of running here. Exit code 0; 2 for bad input, 3
from fit and predict where there is no forecast.
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
    call_of,
    file_to_read,
    folder_to_read,
    list_of,
    one_of,
    real,
    whole,
)
from megatron_completep.config import load_config
from megatron_completep.config.schema import Config
from megatron_completep.errors import UserError, exit_on_user_error, when_interrupted
from megatron_completep.instruments import ladder as ladders
from megatron_completep.instruments import ladder_advice, ladder_jobs, ladder_report, sweep
from megatron_completep.instruments.derive import BATCH_POWER, TOKENS_PER_PARAMETER, Scaling
from megatron_completep.instruments.run_shape import Asked
from megatron_completep.instruments.trial import PARAMETERIZATIONS
from megatron_completep.outputs import Output, check_outputs
from megatron_completep.parallel.context import choose_device
from megatron_completep.planning.scaling_report import table
from megatron_completep.tools.lr_transfer import slurm_options

NO_FORECAST = 3  # the exit code


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_plan(commands)
    _add_run(commands)
    fit = commands.add_parser(
        "fit", help="the law, the forecast of the top rung from the others, and the report"
    )
    fit.add_argument("folder", type=folder_to_read, help="the ladder's folder")
    _add_json(fit)
    predict = commands.add_parser("predict", help="the loss of a run that was not trained")
    predict.add_argument("folder", type=folder_to_read, help="the ladder's folder")
    add_size(predict, required=True)
    _add_json(predict)
    return parser.parse_args(argv)


def _add_plan(commands: Any) -> None:
    command = commands.add_parser("plan", help="write the rungs' configurations; trains nothing")
    command.add_argument("config", type=file_to_read, help="YAML file of the proxy")
    command.add_overrides()
    command.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="the ladder's folder"
    )
    command.add_argument(
        "--rungs", type=whole(2, 50), default=5, help="sizes (default: 5); a fit needs 4"
    )
    command.add_argument(
        "--to-flops",
        type=real(above=0),
        required=True,
        metavar="C",
        help="FLOPs of the top rung's run",
    )
    command.add_argument(
        "--from-flops",
        type=real(above=0),
        metavar="C",
        help="FLOPs of the lowest rung's run (default: of the proxy's shape)",
    )
    command.add_argument(
        "--shape",
        type=ratio,
        metavar="N:L",
        help="width to depth, such as 64:1 or 64 (default: the proxy's)",
    )
    add_scaling(command)
    command.add_argument(
        "--seeds",
        type=list_of(whole(1, 1000)),
        default=[3],
        help="repetitions of every rung, or a list with one number a rung (default: 3)",
    )
    command.add_argument(
        "--parameterizations",
        type=list_of(one_of(PARAMETERIZATIONS)),
        default=["completep"],
        help="of completep,alpha_0.5,mup,sp; those behind the first are controls",
    )
    command.add_argument(
        "--no-lr-check",
        action="store_true",
        help="leave out the learning rates an octave below and above, at both ends of the ladder",
    )
    command.add_argument(
        "--study",
        type=list_of(ratio),
        default=[],
        metavar="N:L,...",
        help="also train these shapes at every rung's compute",
    )
    command.add_argument("--target-parameters", type=real(above=0), metavar="P")
    command.add_argument("--target-flops", type=real(above=0), metavar="C")
    command.add_argument("--target-depth", type=whole(1, 10**5), metavar="L")
    _add_json(command)


def _add_run(commands: Any) -> None:
    command = commands.add_parser("run", help="train every run that has no result yet")
    command.add_argument("folder", type=folder_to_read, help="the ladder's folder")
    command.add_argument(
        "--workers", type=whole(1, 1024), help="runs at once (default: one a core, or six a GPU)"
    )
    command.add_argument(
        "--only", type=whole(0), metavar="NUMBER", help="this run alone, counted from 0"
    )
    command.add_argument(
        "--slurm",
        metavar="KEY=VALUE,...",
        help="submit to Slurm with these options of submitit, "
        "such as timeout_min=60,gpus_per_node=1",
    )
    command.add_argument(
        "--write-jobs",
        action="store_true",
        help="write FOLDER/jobs/ladder.sbatch and ladder.yaml (Kubernetes), and run nothing",
    )
    _add_json(command)


def add_size(command: Parser, required: bool) -> None:
    """What a run's size is asked by: one of three options."""
    size = command.add_mutually_exclusive_group(required=required)
    size.add_argument("--parameters", type=real(above=0), metavar="P", help="embeddings included")
    size.add_argument("--flops", type=real(above=0), metavar="C", help="of the whole run")
    size.add_argument("--depth", type=whole(1, 10**5), metavar="L", help="layers")


def add_scaling(command: Parser) -> None:
    """The options that say how batch, steps and learning rate follow from a run's size."""
    command.add_argument(
        "--tokens-per-parameter",
        type=real(above=0),
        metavar="R",
        help=f"length of a run (default: {TOKENS_PER_PARAMETER:g}, arXiv 2203.15556)",
    )
    command.add_argument(
        "--batch-power",
        type=real(at_least=0, at_most=1),
        default=BATCH_POWER,
        metavar="B",
        help=f"exponent of the batch in tokens (default: {BATCH_POWER}, arXiv 2505.13738)",
    )
    command.add_argument(
        "--duration-exponent",
        type=real(at_least=0, at_most=2),
        metavar="D",
        help="exponent of the learning rate in tokens, fitted (lr_transfer) or published "
        "(default: the proxy's completep.duration_exponent)",
    )
    command.add_argument(
        "--weight-decay-rule",
        choices=("table", "inverse_width", "tau"),
        help="optimizer.weight_decay_rule; tau keeps the proxy's (default: the proxy's rule)",
    )


def scaling_of(arguments: argparse.Namespace) -> Scaling:
    """The options of `add_scaling`."""
    return Scaling(
        arguments.tokens_per_parameter or TOKENS_PER_PARAMETER,
        arguments.batch_power,
        arguments.duration_exponent,
        arguments.weight_decay_rule,
    )


def ratio(text: str) -> float:
    """'64:1' or '64': N / L."""
    width, colon, depth = text.partition(":")
    value = real(above=0, at_most=1e6)
    return value(width) / value(depth) if colon else value(width)


def _add_json(command: Parser) -> None:
    command.add_argument(
        "--json", action="store_true", help="one object on stdout, the log on stderr"
    )


def run_plan(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Write ladder.json and the rungs."""
    check_outputs([Output("--out", arguments.out, folder=True)])
    proxy = load_config(arguments.config, arguments.overrides)
    wish = ladders.Wish(
        arguments.rungs,
        arguments.to_flops,
        arguments.shape or ladders.ratio_of(proxy),
        scaling_of(arguments),
        arguments.seeds,
        arguments.parameterizations,
        not arguments.no_lr_check,
        arguments.study,
        _target(arguments, proxy),
        arguments.from_flops,
    )
    ladder = ladders.plan(proxy, wish)
    ladders.save(ladder, arguments.out)
    rows = list(ladders.table_rows(ladder))
    say("\n".join(table(ladders.ROW_HEADS, rows)))
    runs = ladders.points(ladder)
    flops = ladders.total_flops(ladder)
    say(f"{len(runs)} runs, {flops:.3g} FLOPs in all: {arguments.out}/ladder.json, rungs/")
    for warning in ladder_advice.warnings(ladder, arguments.study, arguments.from_flops):
        say(f"warning: {warning}")
    if ladder.target is not None:
        target = ladder.target
        say(f"target: {target.shape}, N : L {target.shape.ratio:.3g}, {target.flops:.3g} FLOPs")
    say(f"next: {shlex.join([*call_of('ladder'), 'run', str(arguments.out)])}")
    return {"runs": len(runs), "flops": flops, "folder": str(arguments.out)}


def _target(arguments: argparse.Namespace, proxy: Config) -> Asked | None:
    sizes = (arguments.target_parameters, arguments.target_flops, arguments.target_depth)
    sizes_given = [size for size in sizes if size is not None]
    if not sizes_given:
        return None
    if len(sizes_given) > 1:
        raise UserError(
            "--target-parameters, --target-flops and --target-depth name one run three ways. "
            "Give one of them."
        )
    wanted_ratio = arguments.shape or ladders.ratio_of(proxy)
    return Asked(wanted_ratio, scaling_of(arguments).tokens_per_parameter, *sizes)


def run_runs(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Train the missing runs here or under Slurm, or write jobs that do."""
    folder: Path = arguments.folder
    _check_ways_to_run(arguments)
    ladder = ladders.load(folder)
    points = ladders.points(ladder)
    if arguments.write_jobs:
        for path in ladder_jobs.write(folder, len(points)):
            say(f"written: {path}")
        return {"runs": len(points), "missing": len(sweep.missing(points, folder))}

    device = ladder.proxy.training.device
    points_to_run = points
    if arguments.only is not None:
        points_to_run = [ladder_jobs.run_number(points, arguments.only)]
    if arguments.slurm is not None:
        options = slurm_options(arguments.slurm)
        jobs = sweep.run_slurm(points_to_run, folder, options, device, name="ladder")
        say(f"{len(jobs)} jobs submitted; fit when they are done")
    else:
        one_device = choose_device(device, 0).type
        workers = arguments.workers or sweep.default_workers(one_device)
        with when_interrupted("finished runs are kept; the same command goes on with the others."):
            sweep.run_local(points_to_run, folder, workers, one_device, say)
        say(f"next: {shlex.join([*call_of('ladder'), 'fit', str(folder)])}")
    return {"runs": len(points), "missing": len(sweep.missing(points, folder))}


def _check_ways_to_run(arguments: argparse.Namespace) -> None:
    """Raises UserError for options of which one would be passed over."""
    one_way = ["--write-jobs"] if arguments.write_jobs else []
    if arguments.slurm is not None:
        one_way.append("--slurm")
    # A Slurm job is one run on one device; the job files run all runs.
    if one_way and arguments.workers is not None:
        one_way.append("--workers")
    if arguments.write_jobs and arguments.only is not None:
        one_way.append("--only")
    if len(one_way) > 1:
        raise UserError(f"{' and '.join(one_way)} do not go together. Leave all but one out.")


def run_predict(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Say the forecast of a run of another size."""
    sizes = (arguments.parameters, arguments.flops, arguments.depth)
    return ladder_report.predict(arguments.folder, sizes, say)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    # With --json, stdout holds one object and nothing else.
    log = sys.stderr if arguments.json else sys.stdout

    def say(line: str) -> None:
        print(line, file=log, flush=True)

    if arguments.command == "plan":
        result = run_plan(arguments, say)
    elif arguments.command == "run":
        result = run_runs(arguments, say)
    elif arguments.command == "fit":
        result = ladder_report.report(arguments.folder, say)
    else:
        result = run_predict(arguments, say)
    if arguments.json:
        print(json.dumps(result))
    # plan and run have no verdict. Whatever is no forecast must stop a script.
    return NO_FORECAST if result.get("verdict", "forecast") != "forecast" else 0


if __name__ == "__main__":
    exit_on_user_error(main)
