"""Draw one optimizer step: the pipeline schedules, and how data-parallel traffic hides behind computation.

Example:

    python tools/draw_step.py --output docs/images/step.png --ranks 4 --micro-batches 8

The schedules come from the library that runs them, the buckets from the optimizer's layout of --config.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_completep.command_line import Parser, file_to_read, real, whole
from megatron_completep.config import load_config
from megatron_completep.errors import UserError, exit_on_user_error
from megatron_completep.outputs import Output, check_outputs
from megatron_completep.planning.sizes import rank_layout, rank_specs
from megatron_completep.planning.step_picture import (
    bubble,
    draw,
    overlap,
    schedule_actions,
    simulate,
)

SCHEDULES = (
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved_1f1b", 2),
    ("zero_bubble", 1),
    ("zero_bubble", 2),
)


DEFAULT = "docs/images/step.png"


def _picture(text: str) -> Path:
    if Path(text).suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError("the ending says the format. Use .png or .svg.")
    return Path(text)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--output",
        type=_picture,
        default=Path(DEFAULT),
        help=".svg or .png (default: docs/images/step.png)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a file that is no picture of this project"
    )
    parser.add_argument(
        "--ranks", type=whole(1, 256), default=4, help="pipeline ranks (default: 4)"
    )
    parser.add_argument(
        "--micro-batches", type=whole(1, 4096), default=8, help="a step (default: 8)"
    )
    parser.add_argument(
        "--config",
        type=file_to_read,
        default="configs/completep_1b.yaml",
        help="whose buckets to draw (default: configs/completep_1b.yaml)",
    )
    parser.add_argument(
        "--bucket-megabytes",
        type=real(above=0, at_most=10**9),
        default=320,
        help="parallel.bucket_megabytes (default: 320, to see few)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    if arguments.micro_batches < arguments.ranks:
        raise UserError(
            f"--micro-batches = {arguments.micro_batches}: fewer than --ranks = {arguments.ranks}. Each schedule needs at least a "
            f"micro-batch for every rank: give --micro-batches {arguments.ranks} or fewer ranks."
        )
    ours = arguments.output == Path(DEFAULT)  # a name of the project's own
    check_outputs(
        [Output("--output", arguments.output, renewed=True)],
        [arguments.config],
        arguments.overwrite or ours,
    )
    panels = []
    for name, virtual in SCHEDULES:
        spans = simulate(
            schedule_actions(name, arguments.ranks, virtual, arguments.micro_batches), virtual
        )
        chunks = f", {virtual} chunks a rank (the second lighter)" if virtual > 1 else ""
        panels.append(
            (
                f"{name}{chunks}: bubble {bubble(spans):.0%}",
                spans,
                [f"rank {rank}" for rank in range(arguments.ranks)],
            )
        )
    config = load_config(
        arguments.config, [f"parallel.bucket_megabytes={arguments.bucket_megabytes}"]
    )
    buckets = [bucket.size for bucket in rank_layout(config, rank_specs(config, 0), 8).buckets]
    panels.append(
        (
            f"data parallel, {len(buckets)} buckets: only the last bucket's gradients and the first parameters wait",
            overlap(buckets),
            ["compute", "network"],
        )
    )
    draw(panels, arguments.output)
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
