"""Search the proxy's hyperparameters with Optuna: search, report.

Example, the learning rate, initial standard deviation and warm-up of configs/quickstart_proxy.yaml,
with the embedding's own factor, in two processes:

    python tools/tune_proxy.py search configs/quickstart_proxy.yaml --out runs/tune \
--over base_lr=1e-3:3e-2,base_init_std=0.005:0.1,warmup_fraction=0:0.3,embedding.lr=0.25:16
    python tools/tune_proxy.py report runs/tune --to configs/tuned_proxy.yaml

A search that was interrupted goes on where it stopped when it is started again; the same command on
another machine that sees the folder joins it. It needs the package optuna
(pip install 'megatron-completep[tune]'). Exit code 0; 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_completep.command_line import Parser, file_to_read, folder_to_read, list_of, whole
from megatron_completep.config import load_config
from megatron_completep.errors import exit_on_user_error, when_interrupted
from megatron_completep.instruments import proxy_report, proxy_search
from megatron_completep.instruments.search_space import check_space, dimension
from megatron_completep.instruments.sweep import default_workers
from megatron_completep.instruments.trial import with_base
from megatron_completep.outputs import Output, check_outputs
from megatron_completep.parallel.context import choose_device
from megatron_completep.tools.lr_transfer import slurm_options


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    search = commands.add_parser("search", help="run trials at the proxy")
    search.add_argument("config", type=file_to_read, help="YAML file of the proxy")
    search.add_overrides()
    search.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="where trials are kept; may hold this search already",
    )
    search.add_argument(
        "--over",
        type=list_of(dimension),
        required=True,
        metavar="NAME=LOW:HIGH,...",
        help="what is searched: base_lr, base_init_std, base_weight_decay, base_eps, "
        "warmup_fraction, beta1, beta2, muon.base_lr, and factors of roles such as embedding.lr",
    )
    search.add_argument(
        "--trials", type=whole(2, 10**6), default=64, help="in all, of all processes (default: 64)"
    )
    search.add_argument(
        "--workers", type=whole(1, 1024), help="trials at once (default: one a core, or six a GPU)"
    )
    search.add_argument("--seed", type=whole(0), default=0, help="of the search (default: 0)")
    search.add_argument(
        "--slurm",
        metavar="KEY=VALUE,...",
        help="submit the workers to Slurm with these options of submitit, "
        "such as timeout_min=600,gpus_per_node=1",
    )
    _add_json(search)

    report = commands.add_parser(
        "report", help="write the proxy that was found, and say whether it is better"
    )
    report.add_argument("folder", type=folder_to_read, help="the search's folder")
    report.add_argument(
        "--to", type=Path, metavar="FILE", help="the YAML file (default: FOLDER/proxy.yaml)"
    )
    report.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    report.add_argument(
        "--seeds",
        type=whole(2, 1000),
        default=5,
        help="repetitions of the best settings and of the configuration's own (default: 5)",
    )
    report.add_argument(
        "--workers", type=whole(1, 1024), help="runs at once (default: one a core, or six a GPU)"
    )
    _add_json(report)
    return parser.parse_args(argv)


def _add_json(command: Parser) -> None:
    command.add_argument(
        "--json", action="store_true", help="one object on stdout, the log on stderr"
    )


def run_search(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Run trials until there are as many as asked for, here or under Slurm."""
    folder: Path = arguments.out
    check_outputs([Output("--out", folder, folder=True)])
    config = with_base(load_config(arguments.config, arguments.overrides))
    check_space(arguments.over, config)
    options = None if arguments.slurm is None else slurm_options(arguments.slurm)
    search = proxy_search.Search(tuple(arguments.over), config, arguments.seed)
    study = proxy_search.prepare(search, folder)

    before = proxy_search.count(study)
    say(f"{before} trials there, {max(0, arguments.trials - before)} to run")
    if options is not None:
        objective = proxy_search.TrainProxy.of(config, config.training.device)
        workers = arguments.workers or 1
        jobs = proxy_search.run_slurm(folder, arguments.trials, objective, workers, options)
        say(f"{len(jobs)} jobs submitted; report when they are done")
    elif before < arguments.trials:
        device = choose_device(config.training.device, 0).type
        workers = min(arguments.workers or default_workers(device), arguments.trials - before)
        gpus = torch.cuda.device_count() if device == "cuda" else 0
        devices = [f"cuda:{number % gpus}" if gpus else "cpu" for number in range(workers)]
        objectives = [proxy_search.TrainProxy.of(config, one) for one in devices]
        with when_interrupted("trials are kept; the same command goes on."):
            proxy_search.run_local(folder, arguments.trials, objectives, say)
    next_command = ["python", "tools/tune_proxy.py", "report", str(folder)]
    say(f"next: {shlex.join(next_command)}")
    return {"folder": str(folder), "trials": proxy_search.count(study)}


def run_report(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Compare, and write the proxy that was found."""
    folder: Path = arguments.folder
    path = arguments.to or folder / "proxy.yaml"
    # The file in the search's own folder is the report's, and is renewed with it.
    overwrite = arguments.overwrite or arguments.to is None
    inputs = [folder / "search.json", folder / "journal.log"]
    check_outputs([Output("--to", path)], inputs, overwrite)
    device = choose_device(proxy_search.Search.load(folder).config.training.device, 0).type
    workers = arguments.workers or default_workers(device)
    with when_interrupted("finished runs are kept; the same command goes on with the others."):
        return proxy_report.report(folder, path, arguments.seeds, workers, device, say)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    # With --json, stdout holds one object and nothing else.
    log = sys.stderr if arguments.json else sys.stdout

    def say(line: str) -> None:
        print(line, file=log, flush=True)

    run = run_search if arguments.command == "search" else run_report
    result = run(arguments, say)
    if arguments.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
