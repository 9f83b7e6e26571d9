"""Look into token files, check, merge and split them, and see exactly what a training step reads.

Examples:

    python tools/dataset.py inspect data/corpus_text_document
    python tools/dataset.py verify data/a data/b --vocab-size 32000
    python tools/dataset.py merge --input data/a data/b --output-prefix data/ab
    python tools/dataset.py split data/ab --shares 99,1 --output-prefix data/train data/validation
    python tools/dataset.py sample configs/quickstart.yaml --step 120        # after a loss spike
    python tools/dataset.py prebuild configs/run.yaml                        # order: megatron; once on every machine
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_completep.command_line import (
    Parser,
    file_to_read,
    list_of,
    names_of_token_files,
    real,
    token_files,
    tokenizer_model,
    whole,
)
from megatron_completep.config.derived import total_samples
from megatron_completep.config.load import load_config
from megatron_completep.config.schema import Config
from megatron_completep.data.corpus import has_validation, prebuild
from megatron_completep.data.describe import (
    choose_tokenizer,
    describe_files,
    describe_step,
    problems_of,
    tokenizer_for,
)
from megatron_completep.data.files import printable
from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.data.left_out import read_left_out
from megatron_completep.data.writer import merge, split
from megatron_completep.errors import DataError, exit_on_user_error, pairs_text
from megatron_completep.outputs import Output, check_outputs
from megatron_completep.run.starts import STARTS, read_starts, samples_read, start_of


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    as_json = Parser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    command = commands.add_parser(
        "inspect", parents=[as_json], help="counts, lengths and the first documents"
    )
    command.add_argument("prefix", type=token_files, help="PREFIX of PREFIX.bin and PREFIX.idx")
    command.add_argument(
        "--documents", type=whole(0), default=3, help="documents to show (default: 3)"
    )
    command.add_argument(
        "--characters", type=whole(0), default=400, help="characters of each (default: 400)"
    )
    command.add_argument(
        "--tokenizer-type",
        choices=["sentencepiece", "huggingface", "tiktoken", "bytes"],
        help="default: PREFIX.json's, or the model's",
    )
    command.add_argument(
        "--tokenizer-model",
        type=tokenizer_model,
        metavar="MODEL",
        help="model file, encoding's name, or RUN/tokenizer",
    )

    command = commands.add_parser(
        "verify",
        parents=[as_json],
        help="check the whole structure and the recorded hashes; exit code 1: a fault",
    )
    command.add_argument("prefix", type=token_files, nargs="+", metavar="PREFIX")
    command.add_argument(
        "--vocab-size", type=whole(), help="check too that every token id is below this"
    )

    replacing = Parser(add_help=False)
    replacing.add_argument(
        "--overwrite", action="store_true", help="replace token files that are there"
    )
    command = commands.add_parser(
        "merge", parents=[as_json, replacing], help="concatenate token files"
    )
    command.add_argument("--input", nargs="+", type=token_files, required=True, metavar="PREFIX")
    command.add_argument("--output-prefix", required=True, metavar="PREFIX")

    command = commands.add_parser(
        "split", parents=[as_json, replacing], help="cut token files into runs of whole documents"
    )
    command.add_argument("prefix", type=token_files, metavar="PREFIX")
    command.add_argument(
        "--shares",
        type=list_of(real(at_least=0)),
        required=True,
        metavar="SHARE,SHARE",
        help="such as 969,30,1",
    )
    command.add_argument(
        "--output-prefix", nargs="+", required=True, metavar="PREFIX", help="one for each share"
    )

    run = Parser(add_help=False, parents=[as_json])
    run.add_argument(
        "config", type=file_to_read, help="the run's YAML file, such as output_dir/config.yaml"
    )
    run.add_overrides()
    command = commands.add_parser(
        "sample", parents=[run], help="the exact samples of a training step, decoded"
    )
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=whole(), help="optimizer step, from 1 as in metrics.jsonl")
    which.add_argument("--validation", action="store_true", help="the validation samples")
    command.add_argument(
        "--characters",
        type=whole(0),
        default=200,
        help="characters of each document (default: 200; 0: all)",
    )
    commands.add_parser(
        "prebuild", parents=[run], help="build the tables of order: megatron beside the token files"
    )
    return parser.parse_args(argv)


def run_inspect(arguments: argparse.Namespace) -> int:
    dataset = IndexedDataset(arguments.prefix)
    tokenizer = tokenizer_for(
        dataset, choose_tokenizer(dataset, arguments.tokenizer_type, arguments.tokenizer_model)
    )
    content = describe_files(dataset, tokenizer, arguments.documents, arguments.characters)
    if arguments.json:
        print(json.dumps(content))
        return 0
    for name, value in content.items():
        if name not in ("first_documents", "sidecar"):
            print(f"{name:24} {value}")
    recorded = (content["sidecar"] or {}).get("tokenizer")
    print(f"{'tokenizer':24} {pairs_text(recorded) if recorded else 'not recorded'}")
    if tokenizer is None and content["first_documents"]:
        print(
            "\nThe tokenizer is not at hand, so there is no text: name its file with --tokenizer-model (a run keeps it in RUN/tokenizer)."
        )
    for document in content["first_documents"]:
        print(f"\ndocument {document['document']}, {document['tokens']} tokens, {document['ids']}")
        if document["text"] is not None:
            print(document["text"])
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    faults = {}
    for prefix in arguments.prefix:
        try:
            faults[prefix] = problems_of(IndexedDataset(prefix), arguments.vocab_size)
        except DataError as error:
            faults[prefix] = [str(error)]
        hashed = (
            ""
            if faults[prefix] or IndexedDataset(prefix).sidecar
            else " (no PREFIX.json: structure only)"
        )
        print(
            f"{printable(prefix)}: {'faulty' if faults[prefix] else 'good'}{hashed}",
            file=sys.stderr,
        )
        for fault in faults[prefix]:
            print(f"  {fault}", file=sys.stderr)
    good = not any(faults.values())
    if arguments.json:
        print(json.dumps({"pass": good, "problems": faults}))
    return 0 if good else 1


def run_merge(arguments: argparse.Namespace) -> int:
    check_written(arguments.input, [arguments.output_prefix], arguments.overwrite)
    report_written(
        {arguments.output_prefix: merge(arguments.input, arguments.output_prefix)}, arguments.json
    )
    return 0


def check_written(prefixes: Sequence[str], outputs: Sequence[str], overwrite: bool) -> None:
    """Refuse output prefixes that are inputs, the same, there already, or not writable."""
    written = [
        Output("--output-prefix", path)
        for prefix in outputs
        for path in names_of_token_files(prefix)
    ]
    check_outputs(
        written, [path for prefix in prefixes for path in names_of_token_files(prefix)], overwrite
    )


def run_split(arguments: argparse.Namespace) -> int:
    check_written([arguments.prefix], arguments.output_prefix, arguments.overwrite)
    contents = split(arguments.prefix, arguments.shares, arguments.output_prefix)
    report_written(dict(zip(arguments.output_prefix, contents, strict=True)), arguments.json)
    return 0


def report_written(contents: dict[str, dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(contents))
        return
    for prefix, content in contents.items():
        print(
            f"{printable(prefix)}: {content['documents']:,} documents, {content['tokens']:,} tokens"
        )


def run_sample(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    if arguments.validation:
        samples = describe_step(config, 1, "validation")
    else:
        samples = describe_step_of_run(config, arguments)
    if arguments.json:
        print(json.dumps({"step": arguments.step, "samples": list(samples)}))
        return 0
    for sample in samples:
        print(
            f"sample {sample['sample']}: {sample['prefix']}, epoch {sample['epoch']}, number {sample['number']}"
        )
        for document in sample["documents"]:
            print(
                f"  document {document['document']} from token {document['position']}, {len(document['tokens'])} tokens"
            )
            print(f"    {shown(document, arguments.characters)}")
    return 0


def describe_step_of_run(config: Config, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The samples that a step of the run read, by the run's own record; what the configuration would read where that says nothing."""
    beside, step = Path(arguments.config).parent, arguments.step
    folder = (
        beside if (beside / STARTS).exists() else Path(config.training.output_dir)
    )  # a run may have been moved
    left_out = read_left_out(folder)
    start = (
        start_of(read_starts(folder), step) if not arguments.overrides else None
    )  # who overrides settings asks what they would do
    if start is None:
        print(
            f"step {step} as this configuration has it; it is not taken from a run's record",
            file=sys.stderr,
        )
        return describe_step(config, step, "train", left_out)
    print(f"step {step} from {folder / STARTS}: the start after step {start.step}", file=sys.stderr)
    config, numbers = samples_read(start, left_out, step, str(folder / STARTS))
    return describe_step(config, step, "train", left_out, numbers)


def shown(document: dict[str, Any], characters: int) -> str:
    content = document["tokens"] if document["text"] is None else document["text"]
    text = repr(content)
    return text if characters == 0 or len(text) <= characters else text[:characters] + " ..."


def run_prebuild(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    samples = {"train": total_samples(config.training)}
    if has_validation(config.data):
        samples["validation"] = config.training.validation_samples
    folders: Sequence[tuple[Any, bool]] = [
        folder
        for part, count in samples.items()
        for folder in prebuild(
            config.data, seq_length=config.model.seq_length, total_samples=count, split=part
        )
    ]
    if arguments.json:
        print(
            json.dumps(
                {"folders": [{"path": str(path), "built": built} for path, built in folders]}
            )
        )
        return 0
    if not folders:
        print("data.order = permutation needs no tables: there is nothing to prebuild.")
    for path, built in folders:
        print(f"{printable(path)}: {'built' if built else 'was there'}")
    return 0


COMMANDS = {
    "inspect": run_inspect,
    "verify": run_verify,
    "merge": run_merge,
    "split": run_split,
    "sample": run_sample,
    "prebuild": run_prebuild,
}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Parse and run one command."""
    arguments = parse_arguments(argv)
    return COMMANDS[arguments.command](arguments)


if __name__ == "__main__":
    exit_on_user_error(main)
