"""Show what a configuration means for every parameter, beside muP and SP. Opens no data.

Example:

    python tools/show_plan.py configs/quickstart.yaml model.num_layers=32

prints the forward multipliers and, for parameters that share them, role, initial standard
deviation, peak learning rate, weight decay and epsilon; then the Hugging Face architectures that
the model can be exported as, and for the others why not. --json prints {"multipliers": {"residual",
"logits", "attention"}, "parameters": [{"name", "shape", "role", "init_std", "lr", "weight_decay",
"eps"}], "active_elements", "export": {"architectures", "reasons_against"}} with this run's values,
one entry a parameter; active elements are those of the parameters that one token meets.

    python tools/show_plan.py configs/completep_1b.yaml --world-size 4096 --gpu h100 \\
        training.global_batch_size=8192

adds what the run asks of each GPU: memory by kind, bytes and collectives a step, pipeline bubble,
predicted step time and what it rests on, checkpoint size, and warnings. With --json it stands under
"scaling". For a GPU that --gpu does not know, name the nearest one and give its own figures:

    python tools/show_plan.py configs/completep_1b.yaml --world-size 16 --gpu a100 \\
        --gpu-tflops 181 --gpu-memory 48
"""

import argparse
import json
from collections.abc import Sequence

from megatron_completep.command_line import Parser, file_to_read, real, whole
from megatron_completep.config import load_config
from megatron_completep.errors import UserError, exit_on_user_error
from megatron_completep.interop.architectures import export_lines, exportable_as
from megatron_completep.planning.plan import active_elements, describe, make_plan
from megatron_completep.planning.scaling import GPUS, gpu_of, scaling_plan
from megatron_completep.planning.scaling_report import describe_scaling, scaling_to_json


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("config", type=file_to_read, metavar="CONFIG", help="a run's YAML file")
    parser.add_overrides("settings to change, such as completep.alpha=0.5")
    parser.add_argument(
        "--world-size",
        type=whole(1, 2**24),
        metavar="N",
        help="plan memory, traffic and time on N GPUs, too",
    )
    parser.add_argument("--gpu", choices=tuple(GPUS), help="which of those GPUs (default: h100)")
    parser.add_argument(
        "--gpu-tflops",
        type=real(above=0),
        metavar="T",
        help="the GPU's own dense bf16 peak, in TFLOP/s, in place of the data sheet's",
    )
    parser.add_argument(
        "--gpu-memory",
        type=real(above=0),
        metavar="GB",
        help="the GPU's own memory, in GB of 10^9 bytes, in place of the data sheet's",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    about_gpus = {
        "--gpu": arguments.gpu,
        "--gpu-tflops": arguments.gpu_tflops,
        "--gpu-memory": arguments.gpu_memory,
    }
    for option, setting in about_gpus.items():
        if setting is not None and arguments.world_size is None:
            raise UserError(
                f"{option} = {setting}: says nothing without a number of GPUs. "
                f"Add --world-size N, or leave {option} out."
            )
    own_figures = {"--gpu-tflops": arguments.gpu_tflops, "--gpu-memory": arguments.gpu_memory}
    for option, figure in own_figures.items():
        if figure is not None and arguments.gpu is None:
            raise UserError(
                f"{option} = {figure}: the bandwidths are those of a known GPU. "
                "Name the nearest one by --gpu."
            )
    gpu = gpu_of(arguments.gpu or "h100", arguments.gpu_tflops, arguments.gpu_memory)
    config = load_config(arguments.config, arguments.overrides)
    # What a role trains with needs no number of GPUs; memory, traffic and time do.
    scaling = None
    if arguments.world_size is not None:
        scaling = scaling_plan(config, arguments.world_size, gpu)

    if arguments.json:
        plan = make_plan(config)
        content = plan.to_json()
        content["active_elements"] = active_elements(config, plan)
        fitting, reasons_against = exportable_as(config.model)
        content["export"] = {"architectures": fitting, "reasons_against": reasons_against}
        if scaling is not None:
            content["scaling"] = scaling_to_json(config, scaling, gpu)
        print(json.dumps(content))
        return 0
    print(describe(config))
    print("\n" + "\n".join(export_lines(config.model, config.export.architecture)))
    if scaling is not None:
        print("\n" + describe_scaling(config, scaling, gpu))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
