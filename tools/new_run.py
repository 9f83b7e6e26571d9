"""Write the configuration of a large run from a tuned proxy, every derived value explained.

Example, a run of 1.5 billion parameters on 64 GPUs:

    python tools/new_run.py configs/completep_1b_proxy.yaml --parameters 1.5e9 --gpus 64 \
--gpu h100 --to runs/run.yaml

The size is asked by --parameters, --flops or --depth. Shape, tokens, batch, steps, decay and the
parallel layout follow; the console shows the neighbouring shapes, the learning rate by published
exponents of the duration, and the next best layouts. The other way, the proxy of a target:

    python tools/new_run.py configs/completep_1b.yaml --proxy --to configs/proxy.yaml

Exit code 0; 2 for bad input, such as GPUs that do not hold the model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_completep.command_line import Parser, file_to_read, real, whole
from megatron_completep.config import load_config
from megatron_completep.config.schema import Config
from megatron_completep.errors import UserError, exit_on_user_error
from megatron_completep.instruments import ladder, new_run
from megatron_completep.instruments.run_shape import Asked
from megatron_completep.outputs import Output, check_outputs
from megatron_completep.planning.scaling import GPUS, gpu_of
from megatron_completep.tools.ladder import add_scaling, add_size, ratio, scaling_of


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "config", type=file_to_read, help="YAML file of the proxy (with --proxy: of the target)"
    )
    parser.add_overrides()
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FILE", help="the YAML file to write"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument(
        "--proxy", action="store_true", help="write the proxy that belongs to this target"
    )
    add_size(parser, required=False)
    parser.add_argument(
        "--shape",
        type=ratio,
        metavar="N:L",
        help="width to depth, such as 64:1 or 64 (default: the proxy's)",
    )
    add_scaling(parser)
    parser.add_argument("--gpus", type=whole(1, 2**16), metavar="N", help="search their layout")
    parser.add_argument("--gpu", choices=tuple(GPUS), help="which ones (default: h100)")
    parser.add_argument(
        "--gpu-memory",
        type=real(above=0),
        metavar="GB",
        help="the GPU's own memory, in GB of 10^9 bytes, in place of the data sheet's",
    )
    parser.add_argument(
        "--json", action="store_true", help="one object on stdout, the log on stderr"
    )
    return parser.parse_args(argv)


def run_new(
    arguments: argparse.Namespace, proxy: Config, say: Callable[[str], None]
) -> dict[str, Any]:
    """Derive and write the run."""
    sizes = (arguments.parameters, arguments.flops, arguments.depth)
    if not any(size is not None for size in sizes):
        raise UserError("how large? Give --parameters P, --flops C or --depth L.")
    if arguments.gpus is None and (arguments.gpu or arguments.gpu_memory):
        raise UserError("--gpu and --gpu-memory say nothing without a number. Add --gpus N.")
    gpus = None
    if arguments.gpus is not None:
        kind = gpu_of(arguments.gpu or "h100", None, arguments.gpu_memory)
        gpus = new_run.Gpus(arguments.gpus, kind)
    wanted_ratio = arguments.shape or ladder.ratio_of(proxy)
    scaling = scaling_of(arguments)
    asked = Asked(wanted_ratio, scaling.tokens_per_parameter, *sizes)
    run = new_run.new_run(proxy, asked, scaling, gpus, say)
    new_run.write(arguments.to, new_run.yaml_of(run))
    say("\n".join(new_run.summary(run)))
    say(f"written: {arguments.to}")
    shape = run.shape
    return {
        "config": str(arguments.to),
        "hidden_size": shape.hidden_size,
        "num_layers": shape.num_layers,
        "parameters": shape.parameters,
        "miss": run.choice.miss,
        "global_batch_size": run.config.training.global_batch_size,
        "train_steps": run.config.training.train_steps,
        "learning_rates": {f"{d:g}": rate for d, rate in new_run.rates(run).items()},
        "step_seconds": run.layouts[0].plan.step_seconds if run.layouts else None,
        "warnings": new_run.warnings(run),
    }


def run_proxy(
    arguments: argparse.Namespace, target: Config, say: Callable[[str], None]
) -> dict[str, Any]:
    """Write the proxy of a target."""
    others = {
        "--parameters": arguments.parameters,
        "--flops": arguments.flops,
        "--shape": arguments.shape,
        "--gpus": arguments.gpus,
        "--gpu": arguments.gpu,
        "--gpu-memory": arguments.gpu_memory,
        "--tokens-per-parameter": arguments.tokens_per_parameter,
        "--duration-exponent": arguments.duration_exponent,
        "--weight-decay-rule": arguments.weight_decay_rule,
    }
    refused_options = [option for option, value in others.items() if value is not None]
    if refused_options:
        raise UserError(
            f"{', '.join(refused_options)}: --proxy takes the shape from completep.base_* or "
            "--depth, and the rest from the target's file. Leave these out."
        )
    proxy = new_run.proxy_of(target, scaling_of(arguments), arguments.depth)
    reason = f"the proxy of {arguments.config}: sweep it with tools/lr_transfer.py"
    new_run.write(arguments.to, new_run.annotated(proxy, {("optimizer", "base_lr"): reason}))
    training = proxy.training
    say(
        f"{proxy.model.num_layers} layers x {proxy.model.hidden_size}, {training.train_steps} "
        f"steps of {training.global_batch_size} sequences"
    )
    say(f"written: {arguments.to}")
    return {"config": str(arguments.to), **proxy.model.model_dump(mode="json")}


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    # With --json, stdout holds one object and nothing else.
    log = sys.stderr if arguments.json else sys.stdout

    def say(line: str) -> None:
        print(line, file=log, flush=True)

    check_outputs([Output("--to", arguments.to)], [arguments.config], arguments.overwrite)
    config = load_config(arguments.config, arguments.overrides)
    act = run_proxy if arguments.proxy else run_new
    result = act(arguments, config, say)
    if arguments.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
