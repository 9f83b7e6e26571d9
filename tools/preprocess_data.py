"""Tokenize text into Megatron-compatible token files.

Example, JSON lines with a key "text", eight workers:

    python tools/preprocess_data.py --input corpus/*.jsonl.zst --output-prefix data/corpus --append-eod --workers 8 \\
        --tokenizer-type sentencepiece --tokenizer-model tokenizer.model

writes data/corpus_text_document.{bin,idx,json} and data/corpus_report.{json,png}.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

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
TOKENIZER_TYPES = ("sentencepiece", "huggingface", "tiktoken", "bytes")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_input = parser.add_argument_group("input")
    add_input.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders or quoted globs ('src/**/*.py'), .gz .zst .xz .bz2 too",
    )
    add_input.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="JSON keys or parquet columns, one output each (default: text)",
    )
    add_input.add_argument(
        "--input-format",
        choices=INPUT_FORMATS,
        default="auto",
        help="auto: by the file's ending, .jsonl .json .ndjson, .parquet, else text. text: a file is a document; lines: a line is",
    )
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument(
        "--tokenizer-type",
        required=True,
        choices=[*TOKENIZER_TYPES, *MEGATRON_NAMES],
        metavar="TYPE",
        help=" | ".join(TOKENIZER_TYPES) + " (or Megatron's names)",
    )
    tokenizer.add_argument(
        "--tokenizer-model",
        type=tokenizer_model,
        metavar="MODEL",
        help=".model file, tokenizer.json or its folder, .tiktoken file or encoding's name",
    )
    tokenizer.add_argument(
        "--append-eod",
        action="store_true",
        help="end every document with the end-of-document token",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="writes PREFIX_KEY_document.{bin,idx,json}; KEY is `text` for plain text",
    )
    output.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an output made from other inputs or settings",
    )
    quality = parser.add_argument_group("quality")
    quality.add_argument(
        "--unicode",
        choices=UNICODE_POLICIES,
        default="refuse",
        help="invalid UTF-8 and lone surrogates: a bad document, or U+FFFD",
    )
    quality.add_argument(
        "--deduplicate", action="store_true", help="keep the first of documents with the same text"
    )
    for bound in ("min-characters", "max-characters", "min-tokens", "max-tokens"):
        quality.add_argument(
            f"--{bound}", type=whole(0), metavar="N", help="drop documents outside this limit"
        )
    quality.add_argument(
        "--max-bad-documents",
        type=whole(0),
        default=0,
        metavar="N",
        help="stop when more documents cannot be read (default: 0)",
    )
    quality.add_argument(
        "--max-document-megabytes",
        type=real(above=0, at_most=2**30),
        default=LARGEST_DOCUMENT >> 20,
        metavar="MB",
        help="a line, file or row larger than this (in 2**20 bytes) is a bad document (default: 256)",
    )
    work = parser.add_argument_group("work")
    work.add_argument(
        "--workers",
        type=whole(1, 4096),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: the cores of this process)",
    )
    work.add_argument(
        "--shard",
        metavar="I/N",
        help="do part I (from 0) of N only, for job arrays; afterwards the same command without --shard merges",
    )
    work.add_argument(
        "--engine", choices=ENGINES, default="local", help="local processes, or Ray actors"
    )
    work.add_argument(
        "--log-interval",
        type=whole(),
        default=1000,
        metavar="N",
        help="documents between progress lines where stderr is no terminal",
    )
    work.add_argument(
        "--partitions",
        type=whole(),
        help="accepted as in Megatron; work is divided by size here, whatever it says",
    )
    work.add_argument(
        "--json", action="store_true", help="print the report as one JSON object on stdout"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    check_together(arguments)
    check_outputs(
        [Output("--output-prefix", path) for path in written_for(arguments)],
        arguments.input,
        overwrite=True,
    )
    settings = PreprocessSettings(
        inputs=tuple(arguments.input),
        output_prefix=arguments.output_prefix,
        tokenizer=TokenizerChoice(
            MEGATRON_NAMES.get(arguments.tokenizer_type, arguments.tokenizer_type),
            arguments.tokenizer_model,
        ),
        json_keys=tuple(arguments.json_keys),
        append_eod=arguments.append_eod,
        input_format=arguments.input_format,
        unicode=arguments.unicode,
        limits=Limits(
            arguments.min_characters,
            arguments.max_characters,
            arguments.min_tokens,
            arguments.max_tokens,
        ),
        deduplicate=arguments.deduplicate,
        largest_document=max(1, round(arguments.max_document_megabytes * (1 << 20))),
    )
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


def check_together(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be meant: limits that no document keeps, a model that is not read, an output without a name."""
    problems = []
    for unit in ("characters", "tokens"):
        low, high = getattr(arguments, f"min_{unit}"), getattr(arguments, f"max_{unit}")
        if low is not None and high is not None and low > high:
            problems.append(
                f"--min-{unit} = {low}: above --max-{unit} = {high}, so every document would be dropped. Swap them."
            )
    if arguments.tokenizer_type == "bytes" and arguments.tokenizer_model is not None:
        problems.append(
            f"--tokenizer-model = {arguments.tokenizer_model}: --tokenizer-type bytes reads no model. Leave it out, or name its type."
        )
    if not arguments.output_prefix:
        problems.append(
            "--output-prefix is empty. Give the beginning of the files' names, such as data/corpus."
        )
    if len(problems) > 1:
        raise DataError(
            "\n".join([f"{len(problems)} problems", *(f"  {problem}" for problem in problems)])
        )
    if problems:
        raise DataError(problems[0])


def written_for(arguments: argparse.Namespace) -> list[Path]:
    """The files that the run will leave, whatever its inputs turn out to be."""
    prefix = arguments.output_prefix
    reports = [Path(f"{prefix}_report.{suffix}") for suffix in ("json", "png")]
    keys = {"text", *arguments.json_keys}
    return reports + [
        path for key in sorted(keys) for path in names_of_token_files(f"{prefix}_{key}_document")
    ]


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """ "2/8" -> (2, 8)."""
    if text is None:
        return None
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise DataError(f"--shard {text}: give I/N with I from 0 to N - 1, such as 0/8.")
    return int(index), int(count)


def describe(report: dict) -> str:
    """A few lines for a person."""
    if "outputs" not in report:
        return f"{report['status']}. Run the same command without --shard when all shards are complete."
    lines = [
        f"{report['documents']:,} documents, {report['text_bytes_a_document']['total']:,} bytes of text, "
        f"{report['bytes_a_token']:.3f} bytes a token"
    ]
    left_out = {
        "bad": report["bad_documents"],
        "duplicates": report["duplicates"],
        **{f"outside the limits of {k}": n for k, n in report["dropped"].items()},
    }
    if any(left_out.values()):
        lines.append(
            "left out: "
            + ", ".join(f"{number:,} {why}" for why, number in left_out.items() if number)
        )
    lines += [
        f"{output['prefix']}  {output['documents']:,} documents  {output['tokens']:,} tokens"
        for output in report["outputs"]
    ]
    return "\n".join([*lines, report["status"]])


if __name__ == "__main__":
    exit_on_user_error(main)
