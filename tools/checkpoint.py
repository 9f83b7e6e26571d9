"""List, describe, verify, compare, rewrite and prune checkpoints.

Examples:

    python tools/checkpoint.py list runs/quickstart
    python tools/checkpoint.py verify runs/quickstart                # the newest one
    python tools/checkpoint.py adapt runs/small configs/deeper.yaml  # more layers, another base

Each command has a --help with an example of its own. Any layout reads any checkpoint: `reshard` is
only for a number of files that suits a disk or an upload.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_completep.checkpoint.adapt import adapt_checkpoint, length_notes
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

# For each command what it does, and an example; both are shown by its --help.
EXAMPLES = {
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
        "write a checkpoint for another configuration that computes the same function:\n"
        "more layers (at the end, silent at first), another base shape, alpha or multiplier;\n"
        "or for longer sequences (with --start-anew), with other rotary frequencies.\n"
        "Training with that configuration goes on from it",
        "adapt runs/small configs/deeper.yaml training.output_dir=runs/deeper",
    ),
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, (purpose, example) in EXAMPLES.items():
        parsers[name] = _add_command(commands, name, purpose, example)

    parsers["list"].add_argument(
        "run", type=folder_to_read, help="a run's output_dir, or a folder that holds step_NNNNNNNN"
    )

    # Several commands read one checkpoint, and two of them write as many files as they are told.
    for name in ("inspect", "verify", "reshard", "adapt"):
        parsers[name].add_argument("checkpoint", type=folder_to_read, help=A_CHECKPOINT)
    for name in ("first", "second"):
        parsers["diff"].add_argument(name, type=folder_to_read, help=A_CHECKPOINT)
    for name in ("reshard", "adapt"):
        parsers[name].add_argument(
            "--files",
            type=whole(1, 10**5),
            default=1,
            metavar="N",
            help="how many files (default: 1)",
        )
    parsers["reshard"].add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="where step_NNNNNNNN is made"
    )
    _add_adapt_options(parsers["adapt"])
    _add_prune_options(parsers["prune"])
    return parser.parse_args(argv)


def _add_command(commands: Any, name: str, purpose: str, example: str) -> Parser:
    first_letter = purpose[0].upper()
    # The list of commands shows what stands before the colon, the command's own help all of it.
    parser: Parser = commands.add_parser(
        name,
        help=purpose.split(":")[0],
        description=f"{first_letter}{purpose[1:]}.",
        epilog=f"Example:\n\n    python tools/checkpoint.py {example}\n",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def _add_adapt_options(parser: Parser) -> None:
    parser.add_argument(
        "config",
        type=file_to_read,
        help="YAML file of the run that shall go on from it; "
        "written into its output_dir/checkpoints",
    )
    parser.add_overrides()
    parser.add_argument(
        "--start-anew",
        action="store_true",
        help="take the weights alone: step 0, no moments, the data from the start",
    )


def _add_prune_options(parser: Parser) -> None:
    parser.add_argument("run", type=folder_to_read, help="a run's output_dir")
    parser.add_argument(
        "--keep",
        type=whole(),
        required=True,
        metavar="K",
        help="newest checkpoints to keep (at least 1)",
    )
    parser.add_argument(
        "--keep-every", type=whole(), metavar="M", help="keep those whose step is a multiple"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")


def show(content: dict[str, Any], as_json: bool, lines: Sequence[str]) -> None:
    """Print the result of a command: one JSON object, or lines for a person."""
    print(json.dumps(content, indent=1) if as_json else "\n".join(lines))


def run_list(arguments: argparse.Namespace) -> int:
    rows = list_checkpoints(arguments.run)
    # A folder that cannot be read is listed too, with the reason.
    lines = [f"step {row['step']:>8}  {row['problem'] or describe_row(row)}" for row in rows]
    show({"checkpoints": rows}, arguments.json, lines or ["no checkpoints"])
    return 0


def describe_row(row: dict[str, Any]) -> str:
    """A checkpoint of `list`, after its step."""
    megabytes = row["bytes"] / 1e6
    size = f"{megabytes:>10.1f} MB in {row['files']} files, {row['tokens']} tokens"
    return f"{size}, layout: {pairs_text(row['layout'])}"


def run_inspect(arguments: argparse.Namespace) -> int:
    content = inspect_checkpoint(checkpoint_at(arguments.checkpoint))
    show(content, arguments.json, describe_checkpoint(content))
    return 0


def describe_checkpoint(content: dict[str, Any]) -> list[str]:
    """The lines of `inspect`."""
    table = content["table"]
    progress = f"step {content['step']} ({content['updates']:.0f} updates)"
    size = size_text(content["bytes"])
    multipliers = f"m_N {table['width_multiplier']:g}, m_L {table['depth_multiplier']:g}"
    lines = [
        f"{content['folder']}: {progress}, {size}; {pairs_text(content['state'])}",
        f"layout: {pairs_text(content['layout'])}; versions: {pairs_text(content['versions'])}",
        f"{multipliers}, alpha {table['alpha']:g}",
        f"{content['elements']:,} parameters:",
    ]
    for name, parameter in content["parameters"].items():
        shape = f"{parameter['shape']} {parameter['dtype']}"
        lines.append(f"  {name:<44} {parameter['role']:<14} {shape}")
    for file in content["files"]:
        lines.append(f"  {file['name']}: {file['bytes']:,} bytes")
    return lines


def run_verify(arguments: argparse.Namespace) -> int:
    folder = checkpoint_at(arguments.checkpoint)
    problems = verify_checkpoint(folder)
    content = {"folder": str(folder), "problems": problems}
    show(content, arguments.json, problems or [f"{folder}: every byte is as it was written"])
    return 1 if problems else 0


def run_diff(arguments: argparse.Namespace) -> int:
    settings, tensors = compare_checkpoints(
        checkpoint_at(arguments.first), checkpoint_at(arguments.second)
    )
    lines = []
    if settings:
        lines.append(side_by_side(settings, "first", "second"))
    else:
        lines.append("settings are equal")
    for row in tensors:
        lines.append(f"  {row['tensor']:<52} {row['largest_difference']}")
    if not tensors:
        lines.append("tensors are equal bit for bit")

    content = {"settings": [vars(difference) for difference in settings], "tensors": tensors}
    show(content, arguments.json, lines)
    # As diff(1) does, so that a script can ask.
    return 1 if settings or tensors else 0


def run_reshard(arguments: argparse.Namespace) -> int:
    check_outputs([Output("--output", arguments.output, folder=True)])
    folder = reshard_checkpoint(
        checkpoint_at(arguments.checkpoint), arguments.output, arguments.files
    )
    show({"folder": str(folder)}, arguments.json, [f"wrote {folder}"])
    return 0


def run_prune(arguments: argparse.Namespace) -> int:
    checkpoints = checkpoints_of(arguments.run)
    removed: Sequence[Path]
    problems: Sequence[str] = []
    if arguments.dry_run:
        # The same choice as that of `prune`.
        folders = committed_steps(checkpoints)
        steps = superseded(folders, arguments.keep, arguments.keep_every)
        removed = [folders[step] for step in steps]
    else:
        # A trainer that is saving holds this lock and removes checkpoints itself.
        lock = OutputLock(checkpoints.parent, wait_seconds=0)
        try:
            removal = prune(checkpoints, arguments.keep, arguments.keep_every)
        finally:
            lock.release()
        removed = removal.removed
        problems = removal.problems

    verb = "would remove" if arguments.dry_run else "removed"
    lines = [f"{verb} {folder}" for folder in removed]
    lines += [f"not removed: {problem}" for problem in problems]
    content = {
        "removed": [str(folder) for folder in removed],
        "problems": problems,
        "dry_run": arguments.dry_run,
    }
    show(content, arguments.json, lines or ["nothing to remove"])
    return 1 if problems else 0


def run_adapt(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    # Where a run of this configuration looks for the checkpoint to go on from.
    checkpoints = Path(config.training.output_dir) / "checkpoints"
    check_outputs([Output("training.output_dir", checkpoints, folder=True)])
    source = checkpoint_at(arguments.checkpoint)
    folder, differences = adapt_checkpoint(
        source, config, checkpoints, arguments.files, arguments.start_anew
    )
    notes = length_notes(source, config)
    # Other rotary angles are meant to be another function of the same weights.
    rotated = any(entry.path.startswith("model.rope_") for entry in differences)
    function = "the same weights with other rotary angles" if rotated else "the same function"
    lines = [
        side_by_side(differences, "checkpoint", "new"),
        *notes,
        f"wrote {folder}: {function}; train with {arguments.config} to go on from it",
    ]
    changed = [vars(entry) for entry in differences]
    content = {"folder": str(folder), "changed": changed, "notes": notes}
    show(content, arguments.json, lines)
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
