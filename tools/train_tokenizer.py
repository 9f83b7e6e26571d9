"""Train a lossless SentencePiece tokenizer on text, JSON lines or parquet (.gz .zst .xz .bz2 too).

Example:

    python tools/train_tokenizer.py --input corpus/ --output tokenizer.model --vocab-size 32000

writes tokenizer.model and tokenizer.model.json (settings, and bytes per token on text that was held out).
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

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


def _input(text: str) -> Path | str:
    """A file, a folder, a glob, or - for standard input."""
    return text if text == "-" else file_or_folder(text)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
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


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    settings = TrainingSettings(
        inputs=tuple(map(str, arguments.input)),
        vocab_size=arguments.vocab_size,
        model_type=arguments.model_type,
        input_megabytes=arguments.input_megabytes,
        special_tokens=tuple(arguments.special_tokens),
        character_coverage=arguments.character_coverage,
        json_keys=tuple(arguments.json_keys),
        input_format=arguments.input_format,
    )
    model: Path = arguments.output
    outputs = [Output("--output", path) for path in (model, model.with_name(f"{model.name}.json"))]
    check_outputs(outputs, arguments.input, arguments.overwrite)
    console = Console(stderr=True, highlight=False)
    start = time.monotonic()
    with console.status("starting") as status:

        def say(text: str) -> None:
            status.update(text)
            console.print(text, markup=False)

        report = train_tokenizer(settings, str(model), say, sys.stdin.buffer if sys.stdin else None)
    console.print(f"done in {time.monotonic() - start:.1f} s")
    print(json.dumps(report) if arguments.json else describe(model, report))
    return 0


def describe(output: Path, report: dict) -> str:
    """One line for a person."""
    identity = report["tokenizer"]
    rate = report["held_out_bytes_a_token"]
    return f"{printable(output)}: {identity['vocab_size']} ids, {rate:.3f} bytes a token on held-out text, hash {identity['hash']}"


if __name__ == "__main__":
    exit_on_user_error(main)
