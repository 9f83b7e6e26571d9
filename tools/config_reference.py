"""Print the reference of all settings, or write it to docs/configuration.md."""

import argparse
from pathlib import Path

from megatron_completep.config.reference import configuration_reference
from megatron_completep.errors import UserError, exit_on_user_error

COMMITTED = Path(__file__).resolve().parents[1] / "docs/configuration.md"


def main() -> int | None:
    """Parse the command line and print or write the reference."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python tools/config_reference.py --write")
    parser.add_argument("--write", action="store_true", help=f"write it to {COMMITTED.relative_to(COMMITTED.parents[1])}")
    if not parser.parse_args().write:
        print(configuration_reference(), end="")
        return 0
    if not COMMITTED.parent.is_dir():
        raise UserError(f"{COMMITTED.parent} does not exist: --write is for a checkout of the project. Leave it away to print.")
    COMMITTED.write_text(configuration_reference(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
