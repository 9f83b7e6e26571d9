"""List the project's configurations and launch templates, or copy them to a folder.

Example:

    python tools/configs.py
    python tools/configs.py --copy my_runs

prints where they lie, or copies them to my_runs/, where they can be edited: an installed package
brings them along. A file that is there already is replaced only with --overwrite.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_completep.command_line import Parser, folder_to_read
from megatron_completep.errors import exit_on_user_error
from megatron_completep.outputs import Output, check_outputs

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--copy", type=folder_to_read, metavar="FOLDER", help="copy them there instead"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that are there already"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    sources = sorted(path for path in CONFIGS.rglob("*") if path.is_file())
    if arguments.copy is None:
        print("\n".join(str(path) for path in sources))
        return 0
    targets = [arguments.copy / path.relative_to(CONFIGS) for path in sources]
    folder = Output("--copy", arguments.copy, folder=True)
    files = [Output("--copy", target) for target in targets]
    check_outputs([folder, *files], sources, arguments.overwrite)
    copy_files(sources, targets)
    print("\n".join(str(target) for target in targets))
    return 0


def copy_files(sources: Sequence[Path], targets: Sequence[Path]) -> None:
    """Copy each file to its target, whose folder is made."""
    for source, target in zip(sources, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


if __name__ == "__main__":
    exit_on_user_error(main)
