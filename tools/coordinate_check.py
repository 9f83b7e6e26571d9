"""Check a parameterization: what stays the same size in models of growing depth and width.

Example:

    python tools/coordinate_check.py configs/quickstart_proxy.yaml --depths 2,4,8,16,32 \\
        --out runs/check

Each model is trained for a few steps, each axis at the smallest size of the others. A control that
is known to be wrong (muP over depth, SP over width, a sum of experts in place of their mean over
their number) runs beside the model. A model of your own: --model package:function, where
function(config, table, context) returns an initialized module that declares the roles of its
parameters (docs/instruments.md). Runs under torchrun too, in any layout.

--float8 asks something else: whether float8 scales that were measured on the smallest model hold
at the others (exit code 0), or do not (1); SP is its control.

Exit code 0: right, and the control is not. 1: wrong. 2: bad input. 3: cannot tell: the intervals
over seeds leave it open (few depths, seeds or steps do), or the control shows nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_completep.command_line import Parser, file_to_read, list_of, one_of, whole
from megatron_completep.config import Config, check_world, load_config
from megatron_completep.errors import ConfigError, exit_on_user_error, when_interrupted
from megatron_completep.files import write_whole
from megatron_completep.instruments import coordinate_check, float8_scales
from megatron_completep.instruments.check_report import (
    describe_check,
    dump,
    finite,
    make_folder,
    write_check,
)
from megatron_completep.instruments.coordinate_verdict import judge
from megatron_completep.instruments.mistakes import MISTAKES, check_mistakes
from megatron_completep.instruments.trial import (
    PARAMETERIZATIONS,
    Design,
    ModelMaker,
    with_base,
)
from megatron_completep.launch import Launch
from megatron_completep.outputs import Output, check_outputs
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.precision import use_threads


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "config", type=file_to_read, metavar="CONFIG", help="a run's YAML file; its data is read"
    )
    parser.add_overrides()
    _add_models(parser)
    _add_measurement(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write coordinate_check.json, .html and pictures there",
    )
    parser.add_argument(
        "--json", action="store_true", help="one object on stdout, the log on stderr"
    )
    return parser.parse_args(argv)


def _add_models(parser: Parser) -> None:
    """Which models are trained, and how."""
    parser.add_argument(
        "--depths",
        type=list_of(whole(1, 10**6)),
        default=[],
        metavar="L,L,...",
        help="numbers of layers, such as 2,4,8,16,32",
    )
    parser.add_argument(
        "--widths",
        type=list_of(whole(1, 10**6)),
        default=[],
        metavar="N,N,...",
        help="hidden sizes (default: the configuration's own)",
    )
    parser.add_argument(
        "--experts",
        type=list_of(whole(1, 10**6)),
        default=[],
        metavar="E,E,...",
        help="numbers of experts, of which a token goes to the configuration's share",
    )
    parser.add_argument(
        "--steps",
        type=whole(1, 10**6),
        default=10,
        help="optimizer steps of each model (default: 10)",
    )
    parser.add_argument(
        "--seeds",
        type=whole(1, 1000),
        default=3,
        help="repetitions with other weights and data; one gives no verdict (default: 3)",
    )
    parser.add_argument(
        "--precision",
        choices=["float32", "float64", "bf16"],
        default="float32",
        help="default: float32",
    )


def _add_measurement(parser: Parser) -> None:
    """What is measured, beside the model or in its place, and by how many processes."""
    parser.add_argument(
        "--beside",
        type=list_of(one_of([*PARAMETERIZATIONS, *MISTAKES])),
        default=[],
        metavar="RULE,...",
        help="also measure and draw these, of completep,alpha_0.5,mup,sp, and for Muon of "
        "muon_adam_width (AdamW's 1/m_N on top), muon_adam_rms (0.2 sqrt(max(d_out, d_in))), for "
        "experts of experts_summed (no 1/k), experts_eps (no 1/e), router_lr (no 1/m_N), "
        "router_init (1/sqrt(m_N) in place of 1/m_N)",
    )
    parser.add_argument(
        "--workers",
        type=whole(1, 1024),
        default=1,
        metavar="N",
        help="models at once, a process of one thread each (default: 1)",
    )
    parser.add_argument(
        "--no-eps",
        action="store_true",
        help="leave out the runs with a large eps, which alone show a wrong eps",
    )
    parser.add_argument(
        "--float8",
        action="store_true",
        help="measure instead whether float8 scales of the smallest model hold at the others",
    )
    parser.add_argument(
        "--model", metavar="PACKAGE:FUNCTION", help="check this model instead of the project's"
    )


def load_function(name: str) -> ModelMaker:
    """package.module:function -> the function; the current folder is searched too.

    Raises ConfigError where there is no such function.
    """
    module_name, colon, function_name = name.partition(":")
    sys.path.insert(0, "")  # this program's own folder stands there, not the user's
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        # The cause stays attached: it may lie deep in the user's own modules.
        raise ConfigError(
            f"--model {name}: {error}. Write PACKAGE:FUNCTION, importable from here."
        ) from error
    if not colon or not callable(function):
        raise ConfigError(f"--model {name}: not a function. Write PACKAGE:FUNCTION.")
    make_model: ModelMaker = function
    return make_model


def make_plan(arguments: argparse.Namespace, config: Config) -> coordinate_check.Plan:
    """The models to train. Raises ConfigError where no size varies."""
    # A value that is given twice would be trained twice.
    depths = set(arguments.depths or [config.model.num_layers])
    widths = set(arguments.widths or [config.model.hidden_size])
    experts = set(arguments.experts)
    if max(len(depths), len(widths), len(experts)) < 2:
        raise ConfigError(
            "nothing to compare: give --depths, --widths or --experts with at least two values, "
            "such as --depths 2,4,8,16,32."
        )
    check_mistakes(arguments.beside, config)
    return coordinate_check.Plan(
        sorted(depths),
        sorted(widths),
        steps=arguments.steps,
        seeds=arguments.seeds,
        precision=arguments.precision,
        check_eps=not arguments.no_eps,
        beside=arguments.beside,
        experts=sorted(experts),
    )


def name_of_model(arguments: argparse.Namespace, config: Config) -> str:
    """What the report calls the model under check."""
    if arguments.model:
        return str(arguments.model)
    name = str(config.completep.parameterization)
    alpha = config.completep.alpha
    return name if alpha == 1 else f"{name}, alpha {alpha:g}"


def check_float8(
    arguments: argparse.Namespace, config: Config, plan: coordinate_check.Plan, launch: Launch
) -> int:
    """Train with dynamic float8 scales and with the proxy's; write and print what came out."""
    if arguments.model or launch.world_size > 1:
        raise ConfigError(
            "--float8 trains the project's own model in single processes. "
            "Leave out --model and torchrun; --workers trains several at once."
        )
    asked = {
        "--experts": arguments.experts,
        "--beside": arguments.beside,
        "--no-eps": arguments.no_eps,
    }
    unread = [option for option, setting in asked.items() if setting]
    if unread:
        raise ConfigError(
            f"--float8 does not read {', '.join(unread)}: it measures the products of dense "
            "matrices over width and depth, with SP as its control. Leave that out."
        )

    def say(line: str) -> None:
        print(line, file=sys.stderr if arguments.json else sys.stdout, flush=True)

    use_threads(config.training.cpu_threads, 1)
    with when_interrupted("a check is all or nothing, so nothing was written; start it again."):
        device = str(ParallelContext.create(config.parallel, config.training.device).device)
        result = float8_scales.collect(config, plan, arguments.workers, device, say)
    say(float8_scales.describe(result))
    if arguments.out is not None:
        settings = {"config": config.model_dump(mode="json"), "plan": vars(plan)}
        make_folder(arguments.out)
        path = arguments.out / "float8_scales.json"
        write_whole(path, dump({**result.to_json(), "settings": settings}))
        say(f"written: {path}")
    if arguments.json:
        print(json.dumps(finite(result.to_json())))
    return result.exit_code


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    config = with_base(load_config(arguments.config, arguments.overrides))
    # A layout that does not fit is refused before any process group exists.
    launch = Launch.from_environment()
    check_world(config, launch.world_size)

    # Everything that can be refused is refused before the hours of work.
    plan = make_plan(arguments, config)
    design = Design(make_model=load_function(arguments.model) if arguments.model else None)
    if arguments.workers > 1 and launch.world_size > 1:
        raise ConfigError(
            f"--workers {arguments.workers} and torchrun exclude each other: "
            "every rank trains its part of each model."
        )
    if arguments.out is not None:
        check_outputs([Output("--out", arguments.out, folder=True)])

    if arguments.float8:
        return check_float8(arguments, config, plan, launch)

    context = ParallelContext.create(config.parallel, config.training.device)
    use_threads(config.training.cpu_threads, launch.local_world_size)
    if arguments.workers > 1:
        run = coordinate_check.in_workers(arguments.workers, str(context.device))
    else:
        run = coordinate_check.in_turn(context)

    # Under torchrun all ranks measure together, and the first one reports.
    def say(line: str) -> None:
        if context.is_first:
            print(line, file=sys.stderr if arguments.json else sys.stdout, flush=True)

    if arguments.seeds == 1:
        say("one seed gives no interval, and so no verdict (exit code 3): --seeds 3 gives both")
    with when_interrupted("a check is all or nothing, so nothing was written; start it again."):
        samples = coordinate_check.collect(config, plan, run, design, say)
    result = judge(samples, config.completep.alpha, config.optimizer.type)

    say(describe_check(result))
    if context.is_first and arguments.out is not None:
        settings = {"config": config.model_dump(mode="json"), "plan": vars(plan)}
        write_check(result, arguments.out, name_of_model(arguments, config), settings)
        say(f"written: {arguments.out / 'coordinate_check.json'}, .html and pictures")
    if context.is_first and arguments.json:
        print(json.dumps(finite(result.to_json())))
    context.close()
    return int(result.verdict)


if __name__ == "__main__":
    exit_on_user_error(main)
