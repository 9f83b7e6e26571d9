"""Measure the data path: reading token files, and making them.

Reading: opening a huge index, seeking to any sample, jumping in a blend, the speed of the loader.

Examples, the index of 100 million documents (2 GB of disk for the time of the run), and tokenizing
beside the libraries' own speed:

    python tools/benchmark_data.py reading --documents 100000000
    python tools/benchmark_data.py preprocessing --megabytes 30
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_completep.benchmarks.data_benchmark import ReadingSettings, benchmark_reading
from megatron_completep.benchmarks.preprocess_benchmark import benchmark_preprocessing
from megatron_completep.command_line import Parser, real, whole
from megatron_completep.errors import exit_on_user_error
from megatron_completep.outputs import Output, check_outputs


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    reading = commands.add_parser(
        "reading", help="open, seek, blend and load from a synthetic corpus"
    )
    # The index takes 20 bytes a document; the zeros of the sparse .bin take nothing.
    reading.add_argument(
        "--documents",
        type=whole(1, 10**9),
        default=1_000_000,
        help="documents of the synthetic index (default: 1,000,000)",
    )
    reading.add_argument(
        "--seq-length", type=whole(1, 10**7), default=4096, help="tokens a sample (default: 4096)"
    )
    reading.add_argument(
        "--seeks", type=whole(1, 10**8), default=5000, help="random samples to time (default: 5000)"
    )
    reading.add_argument(
        "--folder",
        type=Path,
        help="where the synthetic files go (default: the system's temporary folder)",
    )

    preprocessing = commands.add_parser(
        "preprocessing",
        help="tokenize beside the tokenizer libraries and megatron-core, alternating, one process",
    )
    preprocessing.add_argument(
        "--megabytes",
        type=real(above=0, at_most=10**6),
        default=24.0,
        help="text of the standard library to tokenize (default: 24)",
    )
    preprocessing.add_argument(
        "--rounds", type=whole(1, 10**4), default=5, help="times each contestant runs (default: 5)"
    )

    for command in (reading, preprocessing):
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser.parse_args(argv)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures that the command asks for, by name."""

    # Progress goes to stderr: with --json, stdout holds one object and nothing else.
    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if arguments.command == "preprocessing":
        return benchmark_preprocessing(arguments.megabytes, arguments.rounds, say)

    folder: Path | None = arguments.folder
    if folder is not None:
        check_outputs([Output("--folder", folder, folder=True)])
    settings = ReadingSettings(
        documents=arguments.documents,
        seq_length=arguments.seq_length,
        seeks=arguments.seeks,
        folder=None if folder is None else str(folder),
    )
    return benchmark_reading(settings, say)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    figures = measure(arguments)
    if arguments.json:
        print(json.dumps(figures))
        return 0
    for name, figure in figures.items():
        print(f"{name:32} {figure}")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
