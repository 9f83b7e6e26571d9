"""Tokenize text into Megatron-compatible token files.

Example, JSON lines with a key "text", eight workers:

    python tools/preprocess_data.py --input corpus/*.jsonl.zst --output-prefix data/corpus \\
        --append-eod --workers 8 --tokenizer-type sentencepiece --tokenizer-model tokenizer.model

writes data/corpus_text_document.{bin,idx,json} and data/corpus_report.{json,png}.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_completep.command_line import (
    Parser,
    names_of_token_files,
    real,
    tokenizer_model,
    whole,
)
from megatron_completep.errors import DataError, exit_on_user_error, when_interrupted
from megatron_completep.outputs import Output, check_outputs
from megatron_completep.preprocess.engines import ENGINES
from megatron_completep.preprocess.quality import UNICODE_POLICIES, Limits
from megatron_completep.preprocess.run import preprocess
from megatron_completep.preprocess.settings import PreprocessSettings, TokenizerChoice
from megatron_completep.preprocess.sources import INPUT_FORMATS, LARGEST_DOCUMENT

# The names Megatron-LM knows the same tokenizers by.
MEGATRON_NAMES = {
    "SentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
    "HuggingFaceTokenizer": "huggingface",
    "TikTokenizer": "tiktoken",
}
ArgumentGroup = argparse._ArgumentGroup  # argparse has no public name for it
TOKENIZER_TYPES = ("sentencepiece", "huggingface", "tiktoken", "bytes")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    _add_input(parser.add_argument_group("input"))
    _add_tokenizer(parser.add_argument_group("tokenizer"))
    _add_output(parser.add_argument_group("output"))
    _add_quality(parser.add_argument_group("quality"))
    _add_work(parser.add_argument_group("work"))
    return parser.parse_args(argv)


def _add_input(group: ArgumentGroup) -> None:
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders or quoted globs ('src/**/*.py'), .gz .zst .xz .bz2 too",
    )
    group.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="JSON keys or parquet columns, one output each (default: text)",
    )
    group.add_argument(
        "--input-format",
        choices=INPUT_FORMATS,
        default="auto",
        help="auto: by the file's ending, .jsonl .json .ndjson, .parquet, else text. "
        "text: a file is a document; lines: a line is",
    )


def _add_tokenizer(group: ArgumentGroup) -> None:
    group.add_argument(
        "--tokenizer-type",
        required=True,
        choices=[*TOKENIZER_TYPES, *MEGATRON_NAMES],
        metavar="TYPE",
        help=" | ".join(TOKENIZER_TYPES) + " (or Megatron's names)",
    )
    group.add_argument(
        "--tokenizer-model",
        type=tokenizer_model,
        metavar="MODEL",
        help=".model file, tokenizer.json or its folder, .tiktoken file or encoding's name",
    )
    group.add_argument(
        "--append-eod",
        action="store_true",
        help="end every document with the end-of-document token",
    )
    group.add_argument(
        "--eod-token",
        metavar="TOKEN",
        help="the token that ends a document (default: the one that the tokenizer names)",
    )
    group.add_argument(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        help="begin every document with the beginning-of-text token (default: where the tokenizer "
        "itself puts it, and for Llama2Tokenizer)",
    )


def _add_output(group: ArgumentGroup) -> None:
    group.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="writes PREFIX_KEY_document.{bin,idx,json}; KEY is `text` for plain text",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an output made from other inputs or settings",
    )


def _add_quality(group: ArgumentGroup) -> None:
    group.add_argument(
        "--unicode",
        choices=UNICODE_POLICIES,
        default="refuse",
        help="invalid UTF-8 and lone surrogates: a bad document, or U+FFFD",
    )
    group.add_argument(
        "--deduplicate", action="store_true", help="keep the first of documents with the same text"
    )
    for bound in ("min-characters", "max-characters", "min-tokens", "max-tokens"):
        group.add_argument(
            f"--{bound}", type=whole(0), metavar="N", help="drop documents outside this limit"
        )
    group.add_argument(
        "--max-bad-documents",
        type=whole(0),
        default=0,
        metavar="N",
        help="stop when more documents cannot be read (default: 0)",
    )
    group.add_argument(
        "--max-document-megabytes",
        type=real(above=0, at_most=2**30),
        default=LARGEST_DOCUMENT >> 20,
        metavar="MB",
        help="a line, file or row larger than this (in 2**20 bytes) is a bad document "
        "(default: 256)",
    )


def _add_work(group: ArgumentGroup) -> None:
    group.add_argument(
        "--workers",
        type=whole(1, 4096),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: the cores of this process)",
    )
    group.add_argument(
        "--shard",
        metavar="I/N",
        help="do part I (from 0) of N only, for job arrays; "
        "afterwards the same command without --shard merges",
    )
    group.add_argument(
        "--engine", choices=ENGINES, default="local", help="local processes, or Ray actors"
    )
    group.add_argument(
        "--log-interval",
        type=whole(),
        default=1000,
        metavar="N",
        help="documents between progress lines where stderr is no terminal",
    )
    # Scripts for Megatron pass it; where the work is divided does not change the result here.
    group.add_argument(
        "--partitions",
        type=whole(),
        help="accepted as in Megatron; work is divided by size here, whatever it says",
    )
    group.add_argument(
        "--json", action="store_true", help="print the report as one JSON object on stdout"
    )


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    check_together(arguments)
    # A run that goes on finds its own files there; `preprocess` refuses those of another run.
    outputs = [Output("--output-prefix", path) for path in written_for(arguments)]
    check_outputs(outputs, arguments.input, overwrite=True)
    settings = settings_of(arguments)
    with when_interrupted("finished work is kept; run the same command again to go on."):
        report = preprocess(
            settings,
            workers=arguments.workers,
            engine=arguments.engine,
            shard=parse_shard(arguments.shard),
            max_bad_documents=arguments.max_bad_documents,
            overwrite=arguments.overwrite,
            log_interval=arguments.log_interval,
        )
    print(json.dumps(report) if arguments.json else describe(report))
    return 0


def settings_of(arguments: argparse.Namespace) -> PreprocessSettings:
    tokenizer_type = MEGATRON_NAMES.get(arguments.tokenizer_type, arguments.tokenizer_type)
    prepend_bos = arguments.prepend_bos
    # Megatron's own class of this name puts the token in front of every text.
    if prepend_bos is None and arguments.tokenizer_type == "Llama2Tokenizer":
        prepend_bos = True
    limits = Limits(
        arguments.min_characters,
        arguments.max_characters,
        arguments.min_tokens,
        arguments.max_tokens,
    )
    document_bytes = arguments.max_document_megabytes * (1 << 20)
    return PreprocessSettings(
        inputs=tuple(arguments.input),
        output_prefix=arguments.output_prefix,
        tokenizer=TokenizerChoice(
            tokenizer_type, arguments.tokenizer_model, prepend_bos, arguments.eod_token
        ),
        json_keys=tuple(arguments.json_keys),
        append_eod=arguments.append_eod,
        input_format=arguments.input_format,
        unicode=arguments.unicode,
        limits=limits,
        deduplicate=arguments.deduplicate,
        largest_document=max(1, round(document_bytes)),  # 0 would refuse every document
    )


def check_together(arguments: argparse.Namespace) -> None:
    """Refuse combinations of options that cannot be meant, all of them in one DataError.

    These are limits that no document keeps, a model that is not read, an output without a name.
    """
    # All problems are reported at once, as the parser does with those of single options.
    problems = []
    for unit in ("characters", "tokens"):
        low = getattr(arguments, f"min_{unit}")
        high = getattr(arguments, f"max_{unit}")
        if low is not None and high is not None and low > high:
            problems.append(
                f"--min-{unit} = {low}: above --max-{unit} = {high}, "
                "so every document would be dropped. Swap them."
            )
    if arguments.tokenizer_type == "bytes" and arguments.tokenizer_model is not None:
        problems.append(
            f"--tokenizer-model = {arguments.tokenizer_model}: "
            "--tokenizer-type bytes reads no model. Leave it out, or name its type."
        )
    if not arguments.output_prefix:
        problems.append(
            "--output-prefix is empty. Give the beginning of the files' names, such as data/corpus."
        )
    if len(problems) > 1:
        lines = [f"  {problem}" for problem in problems]
        raise DataError("\n".join([f"{len(problems)} problems", *lines]))
    if problems:
        raise DataError(problems[0])


def written_for(arguments: argparse.Namespace) -> list[Path]:
    """The files that the run will leave, whatever its inputs turn out to be."""
    prefix = arguments.output_prefix
    paths = [Path(f"{prefix}_report.json"), Path(f"{prefix}_report.png")]
    # Plain text has the key `text`, and whether an input is plain text shows when it is read.
    for key in sorted({"text", *arguments.json_keys}):
        paths += names_of_token_files(f"{prefix}_{key}_document")
    return paths


def parse_shard(shard: str | None) -> tuple[int, int] | None:
    """ "2/8" -> (2, 8). Raises DataError where it is no such pair."""
    if shard is None:
        return None
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise DataError(f"--shard {shard}: give I/N with I from 0 to N - 1, such as 0/8.")
    return int(index), int(count)


def describe(report: dict[str, Any]) -> str:
    """A few lines for a person."""
    # With --shard nothing is merged, so there is no output to describe.
    if "outputs" not in report:
        return (
            f"{report['status']}. "
            "Run the same command without --shard when all shards are complete."
        )

    total_bytes = report["text_bytes_a_document"]["total"]
    sizes = f"{report['documents']:,} documents, {total_bytes:,} bytes of text"
    lines = [f"{sizes}, {report['bytes_a_token']:.3f} bytes a token"]

    counts = {"bad": report["bad_documents"], "duplicates": report["duplicates"]}
    for limit, count in report["dropped"].items():
        counts[f"outside the limits of {limit}"] = count
    left_out = [f"{count:,} {reason}" for reason, count in counts.items() if count]
    if left_out:
        lines.append(f"left out: {', '.join(left_out)}")

    for output in report["outputs"]:
        size = f"{output['documents']:,} documents  {output['tokens']:,} tokens"
        lines.append(f"{output['prefix']}  {size}")
    return "\n".join([*lines, report["status"]])


if __name__ == "__main__":
    exit_on_user_error(main)
