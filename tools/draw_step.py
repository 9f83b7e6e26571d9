"""Draw one optimizer step: pipeline schedules, and data-parallel traffic behind computation.

Example:

    python tools/draw_step.py --output docs/images/step.png --ranks 4 --micro-batches 8

The schedules come from the library that runs them, the buckets from the optimizer's layout of
--config.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_completep.command_line import Parser, file_to_read, real, whole
from megatron_completep.config import Config, load_config
from megatron_completep.errors import UserError, exit_on_user_error
from megatron_completep.outputs import Output, check_outputs
from megatron_completep.planning.sizes import rank_layout, rank_specs
from megatron_completep.planning.step_picture import (
    Span,
    bubble,
    draw,
    overlap,
    schedule_actions,
    simulate,
)

SCHEDULES = (  # name, chunks of the model on a rank
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved_1f1b", 2),
    ("zero_bubble", 1),
    ("zero_bubble", 2),
)
DEFAULT = "docs/images/step.png"
DATA_RANKS = 8

Panel = tuple[str, list[Span], list[str]]  # title, boxes, names of the lanes


def _picture(name: str) -> Path:
    path = Path(name)
    if path.suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError("the ending says the format. Use .png or .svg.")
    return path


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
    # The size of a run's buckets would make too many to see.
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
            f"--micro-batches = {arguments.micro_batches}: "
            f"fewer than --ranks = {arguments.ranks}. Each schedule needs at least a "
            f"micro-batch for every rank: give --micro-batches {arguments.ranks} or fewer ranks."
        )
    # The default is the project's own picture, which is there to be replaced.
    replace = arguments.overwrite or arguments.output == Path(DEFAULT)
    output = Output("--output", arguments.output, renewed=True)
    check_outputs([output], [arguments.config], replace)

    panels = [
        schedule_panel(name, chunks, arguments.ranks, arguments.micro_batches)
        for name, chunks in SCHEDULES
    ]
    overrides = [f"parallel.bucket_megabytes={arguments.bucket_megabytes}"]
    panels.append(data_parallel_panel(load_config(arguments.config, overrides)))
    draw(panels, arguments.output)
    print(f"wrote {arguments.output}")
    return 0


def schedule_panel(name: str, chunks: int, ranks: int, micro_batches: int) -> Panel:
    """A pipeline schedule with so many chunks of the model on each rank."""
    spans = simulate(schedule_actions(name, ranks, chunks, micro_batches), chunks)
    title = f"{name}: bubble {bubble(spans):.0%}"
    if chunks > 1:
        title = f"{name}, {chunks} chunks a rank (the second lighter): bubble {bubble(spans):.0%}"
    return title, spans, [f"rank {rank}" for rank in range(ranks)]


def data_parallel_panel(config: Config) -> Panel:
    """The reduction of gradients, bucket by bucket, beside the backward pass."""
    layout = rank_layout(config, rank_specs(config, 0), DATA_RANKS)
    buckets = [bucket.size for bucket in layout.buckets]
    title = (
        f"data parallel, {len(buckets)} buckets: "
        "only the last bucket's gradients and the first parameters wait"
    )
    return title, overlap(buckets), ["compute", "network"]


if __name__ == "__main__":
    exit_on_user_error(main)
