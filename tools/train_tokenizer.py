"""Train a lossless SentencePiece tokenizer on text, JSON lines or parquet (.gz .zst .xz .bz2 too).

Example:

    python tools/train_tokenizer.py --input corpus/ --output tokenizer.model --vocab-size 32000

writes tokenizer.model and tokenizer.model.json (settings, and bytes per token on text that was held
out).
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_completep.command_line import Parser, file_or_folder, real, whole
from megatron_completep.data.files import printable
from megatron_completep.errors import exit_on_user_error
from megatron_completep.outputs import Output, check_outputs
from megatron_completep.preprocess.sources import INPUT_FORMATS
from megatron_completep.preprocess.tokenizer_training import (
    MODEL_TYPES,
    TrainingSettings,
    train_tokenizer,
)


def _input(name: str) -> Path | str:
    """A file, a folder, a glob, or - for standard input."""
    return name if name == "-" else file_or_folder(name)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    _add_files(parser)
    _add_vocabulary(parser)
    parser.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="JSON keys or parquet columns to read (default: text)",
    )
    parser.add_argument(
        "--input-format", choices=INPUT_FORMATS, default="auto", help="as in preprocess_data.py"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a tokenizer that is there"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the report as one JSON object on stdout"
    )
    return parser.parse_args(argv)


def _add_files(parser: Parser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        type=_input,
        required=True,
        metavar="PATH",
        help="files, folders or quoted globs ('src/**/*.py'); -: standard input",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="the model file to write, such as tokenizer.model",
    )


def _add_vocabulary(parser: Parser) -> None:
    """What is learned, and from how much text."""
    parser.add_argument(
        "--vocab-size",
        type=whole(1, 10**7),
        required=True,
        metavar="N",
        help="ids in all, bytes and special tokens included",
    )
    parser.add_argument(
        "--model-type",
        choices=MODEL_TYPES,
        default="bpe",
        help="default: bpe; unigram takes about 15 times as long",
    )
    parser.add_argument(
        "--input-megabytes",
        type=real(above=0),
        default=50.0,
        metavar="MB",
        help="how much text to sample, over all files (default: 50)",
    )
    parser.add_argument(
        "--special-tokens",
        nargs="*",
        default=[],
        metavar="NAME",
        help="further special tokens; text never becomes one",
    )
    parser.add_argument(
        "--character-coverage",
        type=real(above=0, at_most=1),
        default=0.9999,
        metavar="SHARE",
        help="rarer characters become bytes (default: 0.9999)",
    )


def settings_of(arguments: argparse.Namespace) -> TrainingSettings:
    return TrainingSettings(
        inputs=tuple(map(str, arguments.input)),
        vocab_size=arguments.vocab_size,
        model_type=arguments.model_type,
        input_megabytes=arguments.input_megabytes,
        special_tokens=tuple(arguments.special_tokens),
        character_coverage=arguments.character_coverage,
        json_keys=tuple(arguments.json_keys),
        input_format=arguments.input_format,
    )


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    settings = settings_of(arguments)
    model: Path = arguments.output
    report_path = model.with_name(f"{model.name}.json")
    outputs = [Output("--output", path) for path in (model, report_path)]
    # Before minutes of training, and for the report beside the model, too.
    check_outputs(outputs, arguments.input, arguments.overwrite)

    # The answer alone goes to stdout, where --json is read by programs.
    console = Console(stderr=True, highlight=False)
    start = time.monotonic()
    with console.status("starting") as status:
        # Every stage stays as a line of the log; the present one shows beside the spinner.
        def say(line: str) -> None:
            status.update(line)
            console.print(line, markup=False)

        # A program that was started without standard input has None there (<&-).
        standard_input = sys.stdin.buffer if sys.stdin else None
        report = train_tokenizer(settings, str(model), say, standard_input)
    console.print(f"done in {time.monotonic() - start:.1f} s")
    print(json.dumps(report) if arguments.json else describe(model, report))
    return 0


def describe(output: Path, report: dict[str, Any]) -> str:
    """One line for a person."""
    identity = report["tokenizer"]
    rate = f"{report['held_out_bytes_a_token']:.3f} bytes a token on held-out text"
    return f"{printable(output)}: {identity['vocab_size']} ids, {rate}, hash {identity['hash']}"


if __name__ == "__main__":
    exit_on_user_error(main)
