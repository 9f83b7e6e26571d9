"""Print the reference of all settings, or write it to docs/configuration.md.

Example:

    python tools/config_reference.py --write
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_completep.command_line import Parser
from megatron_completep.config.reference import configuration_reference
from megatron_completep.errors import UserError, exit_on_user_error
from megatron_completep.outputs import Output, check_outputs

COMMITTED = Path(__file__).resolve().parents[1] / "docs/configuration.md"


def main(argv: Sequence[str] | None = None) -> int | None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"write it to {COMMITTED.relative_to(COMMITTED.parents[1])}",
    )
    if not parser.parse_args(argv).write:
        print(configuration_reference(), end="")
        return 0

    # Where the package is installed, this path lies beside it and holds no documentation.
    if not COMMITTED.parent.is_dir():
        raise UserError(
            f"{COMMITTED.parent} does not exist: --write is for a checkout of the project. "
            "Leave it away to print."
        )
    check_outputs([Output("--write", COMMITTED)], overwrite=True)
    COMMITTED.write_text(configuration_reference(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
