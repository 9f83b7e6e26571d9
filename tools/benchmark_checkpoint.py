"""Time saving and loading a checkpoint against plain writing and reading, a memory copy, and torch's distributed checkpoint.

Example:

    python tools/benchmark_checkpoint.py --megabytes 500 --folder /data/scratch

Everything moves the same bytes on the same disk, turn by turn in one run; hashes are on. Reads come from the disk: the files'
pages are dropped from the cache first.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_completep.benchmarks.checkpoint_benchmark import (
    CheckpointSpeeds,
    benchmark_checkpoints,
)
from megatron_completep.command_line import Parser, whole
from megatron_completep.errors import exit_on_user_error
from megatron_completep.outputs import Output, check_outputs

GOALS = (  # what, against what, its share of the other's speed, the goal
    ("save", "plain write", 0.7),
    ("load", "plain read", 0.8),
    ("asynchronous save blocks", "memory copy", 1 / 1.2),
    ("save", "torch DCP save", 1.0),
)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--megabytes",
        type=whole(1, 10**6),
        default=300,
        help="size of the checkpoint (default: 300)",
    )
    parser.add_argument(
        "--rounds", type=whole(1, 10**4), default=5, help="timed turns (default: 5)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("."), help="where to write (default: here)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser.parse_args(argv)


def show(speeds: CheckpointSpeeds) -> str:
    lines = [f"{speeds.bytes / 1e6:.1f} MB"]
    for speed in speeds.speeds.values():
        spread = f"{min(speed.seconds):.3f} to {max(speed.seconds):.3f}"
        lines.append(
            f"  {speed.name:<26} {speed.median:>8.3f} s ({spread})  {speeds.bytes / 1e6 / speed.median:>9,.0f} MB/s"
        )
    for one, other, goal in GOALS:
        lines.append(
            f"  {one} at {1 / speeds.ratio(one, other):.2f} times the speed of: {other} (goal {goal:.2f})"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    check_outputs([Output("--folder", arguments.folder, folder=True)])
    speeds = benchmark_checkpoints(arguments.folder, arguments.megabytes, arguments.rounds)
    if arguments.json:
        ratios = {f"{one} / {other}": 1 / speeds.ratio(one, other) for one, other, _ in GOALS}
        print(
            json.dumps(
                {
                    "bytes": speeds.bytes,
                    "seconds": {n: list(s.seconds) for n, s in speeds.speeds.items()},
                    "speed_ratios": ratios,
                }
            )
        )
    else:
        print(show(speeds))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
