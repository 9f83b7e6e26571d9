"""The whole job here: corpus, tokenizer, a model 4 times as deep as its proxy, report.

Example:

    python tools/quickstart.py                           # what `make quickstart` runs
    python tools/quickstart.py training.train_steps=400

Nothing is asked and nothing is downloaded: the corpus is the source of Python's own standard
library. What is done already is kept, so an interrupted quickstart goes on; remove runs/quickstart
to train anew.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from megatron_completep.command_line import Parser, file_to_read, real
from megatron_completep.errors import exit_on_user_error, when_interrupted
from megatron_completep.reports.quickstart import Quickstart


def default_config() -> Path:
    """The quickstart's configuration of this folder, otherwise that of the installed package."""
    here = Path("configs/quickstart.yaml")
    return here if here.exists() else Path(__file__).resolve().parents[1] / here


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_overrides()
    parser.add_argument(
        "--config",
        type=file_to_read,
        default=default_config(),
        help="default: configs/quickstart.yaml, here or of the package",
    )
    parser.add_argument(
        "--goal",
        type=real(),
        default=2.5,
        metavar="NATS",
        help="exit 1 when the loss ends less than this below a uniform guess (default: 2.5)",
    )
    return parser.parse_args(argv)


class Bars:
    """One progress bar after the other, on a terminal; nothing elsewhere."""

    def __init__(self, console: Console):
        self._progress = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def show(self, what: str, done: int, total: int) -> None:
        """Move the bar of a piece of work, which begins with its first call and ends at `total`."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
            self._progress.start()
        self._progress.update(self._tasks[what], completed=done)
        # Between two bars the console belongs to the log.
        if done == total:
            self._progress.stop()


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    console = Console(highlight=False, soft_wrap=True)

    # Paths may hold brackets, which rich would read as markup.
    def say(line: str) -> None:
        console.print(line, markup=False)

    bars = Bars(console)
    quickstart = Quickstart(str(arguments.config), arguments.overrides, say, bars.show)
    with when_interrupted("what is done is kept, and the same command goes on."):
        nats_below_guess = quickstart.run()
    if nats_below_guess < arguments.goal:
        console.print(f"The goal was {arguments.goal} nats below; this is less.", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
