"""Draw one optimizer step: the pipeline schedules, and how data-parallel traffic hides behind computation.

Example:

    python tools/draw_step.py --output docs/images/step.png --ranks 4 --micro-batches 8

The schedules come from the library that runs them, the buckets from the optimizer's layout of --config.
"""

import argparse
from pathlib import Path

from megatron_completep.analysis.sizes import rank_layout, rank_specs
from megatron_completep.analysis.step_picture import bubble, draw, overlap, schedule_actions, simulate
from megatron_completep.config import load_config
from megatron_completep.errors import exit_on_user_error

SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("zero_bubble", 1), ("zero_bubble", 2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/images/step.png"), help=".svg or .png (default: docs/images/step.png)")
    parser.add_argument("--ranks", type=int, default=4, help="pipeline ranks (default: 4)")
    parser.add_argument("--micro-batches", type=int, default=8, help="a step (default: 8)")
    parser.add_argument("--config", default="configs/completep_1b.yaml", help="whose buckets to draw (default: configs/completep_1b.yaml)")
    parser.add_argument("--bucket-megabytes", type=float, default=320, help="parallel.bucket_megabytes (default: 320, to see few)")
    return parser.parse_args()


def main() -> int | None:
    arguments = parse_arguments()
    panels = []
    for name, virtual in SCHEDULES:
        spans = simulate(schedule_actions(name, arguments.ranks, virtual, arguments.micro_batches), virtual)
        chunks = f", {virtual} chunks a rank (the second lighter)" if virtual > 1 else ""
        panels.append((f"{name}{chunks}: bubble {bubble(spans):.0%}", spans, [f"rank {rank}" for rank in range(arguments.ranks)]))
    config = load_config(arguments.config, [f"parallel.bucket_megabytes={arguments.bucket_megabytes}"])
    buckets = [stop - start for start, stop in rank_layout(config, rank_specs(config, 0), 8).buckets]
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
