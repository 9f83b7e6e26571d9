"""List, describe, verify, compare and rewrite checkpoints.

Examples:

    python tools/checkpoint.py list runs/quickstart
    python tools/checkpoint.py inspect runs/quickstart                     # the newest one
    python tools/checkpoint.py verify runs/quickstart/checkpoints/step_00000120
    python tools/checkpoint.py diff runs/a/checkpoints/step_00000100 runs/b/checkpoints/step_00000100
    python tools/checkpoint.py reshard runs/quickstart --files 1 --output /data/for_release
    python tools/checkpoint.py prune runs/quickstart --keep 1 --dry-run

Any layout reads any checkpoint: `reshard` is only for a number of files that suits a disk or an upload.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_completep.errors import exit_on_user_error
from megatron_completep.training.checkpoint.compare import table_of
from megatron_completep.training.checkpoint.examine import (
    checkpoint_at,
    checkpoints_of,
    compare_checkpoints,
    inspect_checkpoint,
    list_checkpoints,
    reshard_checkpoint,
    verify_checkpoint,
)
from megatron_completep.training.checkpoint.manifest import committed_steps
from megatron_completep.training.checkpoint.retention import prune, superseded
from megatron_completep.training.guards.lock import OutputLock


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    command = commands.add_parser("list", parents=[as_json], help="the checkpoints of a run")
    command.add_argument("run", type=Path, help="a run's output_dir")
    command = commands.add_parser("inspect", parents=[as_json], help="step, layout, parameterization, parameters")
    command.add_argument("checkpoint", type=Path, help="a checkpoint's folder, or a run's (its newest)")
    command = commands.add_parser("verify", parents=[as_json], help="check every hash; exit code 1 and the file's name: a fault")
    command.add_argument("checkpoint", type=Path, help="a checkpoint's folder, or a run's (its newest)")
    command = commands.add_parser("diff", parents=[as_json], help="settings and tensors that differ; exit code 1: some do")
    command.add_argument("first", type=Path)
    command.add_argument("second", type=Path)
    command = commands.add_parser("reshard", parents=[as_json], help="write the same checkpoint as another number of files")
    command.add_argument("checkpoint", type=Path, help="a checkpoint's folder, or a run's (its newest)")
    command.add_argument("--files", type=int, default=1, help="how many files (default: 1)")
    command.add_argument("--output", type=Path, required=True, help="folder in which step_NNNNNNNN is made")
    command = commands.add_parser("prune", parents=[as_json], help="remove older checkpoints")
    command.add_argument("run", type=Path, help="a run's output_dir")
    command.add_argument("--keep", type=int, required=True, help="newest checkpoints to keep (at least 1)")
    command.add_argument("--keep-every", type=int, help="keep those whose step is a multiple")
    command.add_argument("--dry-run", action="store_true", help="only say what would go")
    arguments = parser.parse_args()
    if arguments.command == "prune" and (arguments.keep < 1 or (arguments.keep_every or 1) < 1):
        parser.error("--keep and --keep-every are at least 1")
    if arguments.command == "reshard" and arguments.files < 1:
        parser.error("--files is at least 1")
    return arguments


def show(value: Any, as_json: bool, text: str) -> None:
    print(json.dumps(value, indent=1) if as_json else text)


def run_list(arguments: argparse.Namespace) -> int:
    rows = list_checkpoints(arguments.run)
    lines = [
        f"step {row['step']:>8}  "
        + (row["problem"] or f"{row['bytes'] / 1e6:>10.1f} MB in {row['files']} files, {row['tokens']} tokens, layout {row['layout']}")
        for row in rows
    ]
    show({"checkpoints": rows}, arguments.json, "\n".join(lines) or "no checkpoints")
    return 0


def run_inspect(arguments: argparse.Namespace) -> int:
    value = inspect_checkpoint(checkpoint_at(arguments.checkpoint))
    table, state = value["table"], value["state"]
    lines = [
        f"{value['folder']}: step {value['step']} ({value['updates']:.0f} updates), {state}, {value['bytes'] / 1e6:.1f} MB",
        f"layout {value['layout']}; versions {value['versions']}",
        f"m_N {table['width_multiplier']:g}, m_L {table['depth_multiplier']:g}, alpha {table['alpha']:g}",
        f"{value['elements']:,} parameters:",
        *(f"  {name:<44} {p['role']:<14} {p['shape']} {p['dtype']}" for name, p in value["parameters"].items()),
        *(f"  {file['name']}: {file['bytes']:,} bytes" for file in value["files"]),
    ]
    show(value, arguments.json, "\n".join(lines))
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    folder = checkpoint_at(arguments.checkpoint)
    problems = verify_checkpoint(folder)
    show({"folder": str(folder), "problems": problems}, arguments.json, "\n".join(problems) or f"{folder}: every byte is as it was written")
    return 1 if problems else 0


def run_diff(arguments: argparse.Namespace) -> int:
    settings, tensors = compare_checkpoints(checkpoint_at(arguments.first), checkpoint_at(arguments.second))
    lines = [table_of(settings, "first", "second")] if settings else ["settings are equal"]
    lines += [f"  {row['tensor']:<52} {row['largest_difference']}" for row in tensors] or ["tensors are equal bit for bit"]
    value = {"settings": [vars(d) for d in settings], "tensors": tensors}
    show(value, arguments.json, "\n".join(lines))
    return 1 if settings or tensors else 0


def run_reshard(arguments: argparse.Namespace) -> int:
    folder = reshard_checkpoint(checkpoint_at(arguments.checkpoint), arguments.output, arguments.files)
    show({"folder": str(folder)}, arguments.json, f"wrote {folder}")
    return 0


def run_prune(arguments: argparse.Namespace) -> int:
    checkpoints = checkpoints_of(arguments.run)
    if arguments.dry_run:
        folders = committed_steps(checkpoints)
        gone = [str(folders[step]) for step in superseded(folders, arguments.keep, arguments.keep_every)]
    else:
        lock = OutputLock(checkpoints.parent, wait_seconds=0)  # not beside a trainer that is saving
        gone = [str(folder) for folder in prune(checkpoints, arguments.keep, arguments.keep_every)]
        lock.release()
    verb = "would remove" if arguments.dry_run else "removed"
    show(
        {"removed": gone, "dry_run": arguments.dry_run},
        arguments.json,
        "\n".join(f"{verb} {folder}" for folder in gone) or "nothing to remove",
    )
    return 0


COMMANDS = {
    "list": run_list,
    "inspect": run_inspect,
    "verify": run_verify,
    "diff": run_diff,
    "reshard": run_reshard,
    "prune": run_prune,
}


def main() -> int | None:
    arguments = parse_arguments()
    try:
        return COMMANDS[arguments.command](arguments)
    except BrokenPipeError:  # `| head`
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    exit_on_user_error(main)
