"""Time saving and loading a checkpoint, beside what the machine and torch do with as many bytes.

The baselines are plain writing and reading, a memory copy, and torch's distributed checkpoint.

Example:

    python tools/benchmark_checkpoint.py --megabytes 500 --folder /data/scratch

Everything moves the same bytes on the same disk, turn by turn in one run; hashes are on. Reads come
from the disk: the files' pages are dropped from the cache first.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_completep.benchmarks.checkpoint_benchmark import (
    CheckpointSpeeds,
    benchmark_checkpoints,
)
from megatron_completep.command_line import Parser, whole
from megatron_completep.errors import exit_on_user_error
from megatron_completep.outputs import Output, check_outputs

# What is measured, its baseline, and the share of the baseline's speed that it should reach.
GOALS = (
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
    """A line for each action, and one for each goal."""
    megabytes = speeds.bytes / 1e6
    lines = [f"{megabytes:.1f} MB"]
    for speed in speeds.speeds.values():
        spread = f"{min(speed.seconds):.3f} to {max(speed.seconds):.3f}"
        rate = f"{megabytes / speed.median:>9,.0f} MB/s"
        lines.append(f"  {speed.name:<26} {speed.median:>8.3f} s ({spread})  {rate}")
    for action, baseline, goal in GOALS:
        # The ratio is one of times, and the goal one of speeds.
        speed_ratio = 1 / speeds.ratio(action, baseline)
        lines.append(
            f"  {action} at {speed_ratio:.2f} times the speed of: {baseline} (goal {goal:.2f})"
        )
    return "\n".join(lines)


def as_json(speeds: CheckpointSpeeds) -> dict[str, Any]:
    seconds = {name: list(speed.seconds) for name, speed in speeds.speeds.items()}
    ratios = {}
    for action, baseline, _ in GOALS:
        ratios[f"{action} / {baseline}"] = 1 / speeds.ratio(action, baseline)
    return {"bytes": speeds.bytes, "seconds": seconds, "speed_ratios": ratios}


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    check_outputs([Output("--folder", arguments.folder, folder=True)])
    speeds = benchmark_checkpoints(arguments.folder, arguments.megabytes, arguments.rounds)
    print(json.dumps(as_json(speeds)) if arguments.json else show(speeds))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
