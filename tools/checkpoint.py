"""List, describe, verify, compare, rewrite and prune checkpoints.

Examples:

    python tools/checkpoint.py list runs/quickstart
    python tools/checkpoint.py verify runs/quickstart                      # the newest one
    python tools/checkpoint.py adapt runs/small configs/deeper.yaml        # on purpose: more layers, another base

Each command has a --help with an example of its own. Any layout reads any checkpoint: `reshard` is only for a number of files that
suits a disk or an upload.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_completep.checkpoint.adapt import adapt_checkpoint
from megatron_completep.checkpoint.compare import side_by_side
from megatron_completep.checkpoint.examine import (
    checkpoint_at,
    checkpoints_of,
    compare_checkpoints,
    inspect_checkpoint,
    list_checkpoints,
    reshard_checkpoint,
    verify_checkpoint,
)
from megatron_completep.checkpoint.manifest import committed_steps
from megatron_completep.checkpoint.retention import prune, superseded
from megatron_completep.command_line import Parser, file_to_read, folder_to_read, whole
from megatron_completep.config import load_config
from megatron_completep.errors import exit_on_user_error, pairs_text, size_text
from megatron_completep.guards.lock import OutputLock
from megatron_completep.outputs import Output, check_outputs

A_CHECKPOINT = "a checkpoint's folder, or a run's (its newest)"

EXAMPLES = {  # command: what it does, an example
    "list": ("the checkpoints of a run", "list runs/quickstart --json"),
    "inspect": (
        "step, layout, parameterization, parameters, files",
        "inspect runs/quickstart/checkpoints/step_00000120",
    ),
    "verify": (
        "check every hash; exit code 1 and the file's name where one differs",
        "verify runs/quickstart",
    ),
    "diff": (
        "settings and tensors that differ; exit code 1 when some do",
        "diff runs/a runs/b/checkpoints/step_00000100",
    ),
    "reshard": (
        "write the same checkpoint as another number of files",
        "reshard runs/quickstart --files 1 --output /data/for_release",
    ),
    "prune": (
        "remove older checkpoints",
        "prune runs/quickstart --keep 2 --keep-every 1000 --dry-run",
    ),
    "adapt": (
        "write a checkpoint for another configuration that computes the same function:\nmore layers (at the end, silent at first), "
        "another base shape, alpha or multiplier.\nTraining with that configuration goes on from it",
        "adapt runs/small configs/deeper.yaml training.output_dir=runs/deeper",
    ),
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = {name: _add(commands, name, text, example) for name, (text, example) in EXAMPLES.items()}
    add["list"].add_argument(
        "run", type=folder_to_read, help="a run's output_dir, or a folder that holds step_NNNNNNNN"
    )
    for name in ("inspect", "verify", "reshard", "adapt"):
        add[name].add_argument("checkpoint", type=folder_to_read, help=A_CHECKPOINT)
    add["diff"].add_argument("first", type=folder_to_read, help=A_CHECKPOINT)
    add["diff"].add_argument("second", type=folder_to_read, help=A_CHECKPOINT)
    for name in ("reshard", "adapt"):
        add[name].add_argument(
            "--files",
            type=whole(1, 10**5),
            default=1,
            metavar="N",
            help="how many files (default: 1)",
        )
    add["reshard"].add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="where step_NNNNNNNN is made"
    )
    add["adapt"].add_argument(
        "config",
        type=file_to_read,
        help="YAML file of the run that shall go on from it; written into its output_dir/checkpoints",
    )
    add["adapt"].add_overrides()
    add["adapt"].add_argument(
        "--start-anew",
        action="store_true",
        help="take the weights alone: step 0, no moments, the data from the start",
    )
    add["prune"].add_argument("run", type=folder_to_read, help="a run's output_dir")
    add["prune"].add_argument(
        "--keep",
        type=whole(),
        required=True,
        metavar="K",
        help="newest checkpoints to keep (at least 1)",
    )
    add["prune"].add_argument(
        "--keep-every", type=whole(), metavar="M", help="keep those whose step is a multiple"
    )
    add["prune"].add_argument("--dry-run", action="store_true", help="only say what would go")
    return parser.parse_args(argv)


def _add(commands: Any, name: str, text: str, example: str) -> Parser:
    parser = commands.add_parser(
        name,
        help=text.split(":")[0],
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"Example:\n\n    python tools/checkpoint.py {example}\n",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def show(value: Any, as_json: bool, text: str) -> None:
    print(json.dumps(value, indent=1) if as_json else text)


def run_list(arguments: argparse.Namespace) -> int:
    rows = list_checkpoints(arguments.run)
    lines = [f"step {row['step']:>8}  {row['problem'] or describe_row(row)}" for row in rows]
    show({"checkpoints": rows}, arguments.json, "\n".join(lines) or "no checkpoints")
    return 0


def describe_row(row: dict[str, Any]) -> str:
    size = f"{row['bytes'] / 1e6:>10.1f} MB in {row['files']} files, {row['tokens']} tokens"
    return f"{size}, layout: {pairs_text(row['layout'])}"


def run_inspect(arguments: argparse.Namespace) -> int:
    value = inspect_checkpoint(checkpoint_at(arguments.checkpoint))
    table, state = value["table"], value["state"]
    lines = [
        f"{value['folder']}: step {value['step']} ({value['updates']:.0f} updates), {size_text(value['bytes'])}; {pairs_text(state)}",
        f"layout: {pairs_text(value['layout'])}; versions: {pairs_text(value['versions'])}",
        f"m_N {table['width_multiplier']:g}, m_L {table['depth_multiplier']:g}, alpha {table['alpha']:g}",
        f"{value['elements']:,} parameters:",
        *(
            f"  {name:<44} {p['role']:<14} {p['shape']} {p['dtype']}"
            for name, p in value["parameters"].items()
        ),
        *(f"  {file['name']}: {file['bytes']:,} bytes" for file in value["files"]),
    ]
    show(value, arguments.json, "\n".join(lines))
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    folder = checkpoint_at(arguments.checkpoint)
    problems = verify_checkpoint(folder)
    show(
        {"folder": str(folder), "problems": problems},
        arguments.json,
        "\n".join(problems) or f"{folder}: every byte is as it was written",
    )
    return 1 if problems else 0


def run_diff(arguments: argparse.Namespace) -> int:
    settings, tensors = compare_checkpoints(
        checkpoint_at(arguments.first), checkpoint_at(arguments.second)
    )
    lines = [side_by_side(settings, "first", "second")] if settings else ["settings are equal"]
    lines += [f"  {row['tensor']:<52} {row['largest_difference']}" for row in tensors] or [
        "tensors are equal bit for bit"
    ]
    value = {"settings": [vars(d) for d in settings], "tensors": tensors}
    show(value, arguments.json, "\n".join(lines))
    return 1 if settings or tensors else 0


def run_reshard(arguments: argparse.Namespace) -> int:
    check_outputs([Output("--output", arguments.output, folder=True)])
    folder = reshard_checkpoint(
        checkpoint_at(arguments.checkpoint), arguments.output, arguments.files
    )
    show({"folder": str(folder)}, arguments.json, f"wrote {folder}")
    return 0


def run_prune(arguments: argparse.Namespace) -> int:
    checkpoints = checkpoints_of(arguments.run)
    problems: list[str] = []
    if arguments.dry_run:
        folders = committed_steps(checkpoints)
        gone = [
            str(folders[step]) for step in superseded(folders, arguments.keep, arguments.keep_every)
        ]
    else:
        lock = OutputLock(checkpoints.parent, wait_seconds=0)  # not beside a trainer that is saving
        try:
            removal = prune(checkpoints, arguments.keep, arguments.keep_every)
        finally:
            lock.release()
        gone, problems = [str(folder) for folder in removal.removed], removal.problems
    verb = "would remove" if arguments.dry_run else "removed"
    show(
        {"removed": gone, "problems": problems, "dry_run": arguments.dry_run},
        arguments.json,
        "\n".join(
            [
                *(f"{verb} {folder}" for folder in gone),
                *(f"not removed: {problem}" for problem in problems),
            ]
        )
        or "nothing to remove",
    )
    return 1 if problems else 0


def run_adapt(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    checkpoints = Path(config.training.output_dir) / "checkpoints"
    check_outputs([Output("training.output_dir", checkpoints, folder=True)])
    source = checkpoint_at(arguments.checkpoint)
    folder, changed = adapt_checkpoint(
        source, config, checkpoints, arguments.files, arguments.start_anew
    )
    text = f"{side_by_side(changed, 'checkpoint', 'new')}\nwrote {folder}: the same function; train with {arguments.config} to go on from it"
    show(
        {"folder": str(folder), "changed": [vars(difference) for difference in changed]},
        arguments.json,
        text,
    )
    return 0


COMMANDS = {
    "list": run_list,
    "inspect": run_inspect,
    "verify": run_verify,
    "diff": run_diff,
    "reshard": run_reshard,
    "prune": run_prune,
    "adapt": run_adapt,
}


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    return COMMANDS[arguments.command](arguments)


if __name__ == "__main__":
    exit_on_user_error(main)
