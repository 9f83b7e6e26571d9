"""Look into token files, check, merge and split them, and see exactly what a training step reads.

Examples:

    python tools/dataset.py inspect data/corpus_text_document
    python tools/dataset.py verify data/a data/b --vocab-size 32000
    python tools/dataset.py merge --input data/a data/b --output-prefix data/ab
    python tools/dataset.py split data/ab --shares 99,1 --output-prefix data/train data/validation
    python tools/dataset.py sample configs/quickstart.yaml --step 120  # after a loss spike
    python tools/dataset.py prebuild configs/run.yaml                  # for order: megatron

`prebuild` has to run once on every machine.
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
from megatron_completep.data.beginning import recorded_beginning
from megatron_completep.data.beginning import shown as shown_beginning
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
    # A parser that lends its option to every command.
    as_json = Parser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    _add_commands_that_read(commands, as_json)
    _add_commands_that_write(commands, as_json)
    _add_commands_of_a_run(commands, as_json)
    return parser.parse_args(argv)


def _add_commands_that_read(commands: Any, as_json: Parser) -> None:
    """`inspect` and `verify`."""
    inspect = commands.add_parser(
        "inspect", parents=[as_json], help="counts, lengths and the first documents"
    )
    inspect.add_argument("prefix", type=token_files, help="PREFIX of PREFIX.bin and PREFIX.idx")
    inspect.add_argument(
        "--documents", type=whole(0), default=3, help="documents to show (default: 3)"
    )
    inspect.add_argument(
        "--characters", type=whole(0), default=400, help="characters of each (default: 400)"
    )
    inspect.add_argument(
        "--tokenizer-type",
        choices=["sentencepiece", "huggingface", "tiktoken", "bytes"],
        help="default: PREFIX.json's, or the model's",
    )
    inspect.add_argument(
        "--tokenizer-model",
        type=tokenizer_model,
        metavar="MODEL",
        help="model file, encoding's name, or RUN/tokenizer",
    )

    verify = commands.add_parser(
        "verify",
        parents=[as_json],
        help="check the whole structure and the recorded hashes; exit code 1: a fault",
    )
    verify.add_argument("prefix", type=token_files, nargs="+", metavar="PREFIX")
    verify.add_argument(
        "--vocab-size", type=whole(), help="check too that every token id is below this"
    )


def _add_commands_that_write(commands: Any, as_json: Parser) -> None:
    """`merge` and `split`."""
    replacing = Parser(add_help=False)
    replacing.add_argument(
        "--overwrite", action="store_true", help="replace token files that are there"
    )
    parents = [as_json, replacing]

    merge_command = commands.add_parser("merge", parents=parents, help="concatenate token files")
    merge_command.add_argument(
        "--input", nargs="+", type=token_files, required=True, metavar="PREFIX"
    )
    merge_command.add_argument("--output-prefix", required=True, metavar="PREFIX")

    split_command = commands.add_parser(
        "split", parents=parents, help="cut token files into runs of whole documents"
    )
    split_command.add_argument("prefix", type=token_files, metavar="PREFIX")
    split_command.add_argument(
        "--shares",
        type=list_of(real(at_least=0)),
        required=True,
        metavar="SHARE,SHARE",
        help="such as 969,30,1",
    )
    split_command.add_argument(
        "--output-prefix", nargs="+", required=True, metavar="PREFIX", help="one for each share"
    )


def _add_commands_of_a_run(commands: Any, as_json: Parser) -> None:
    """`sample` and `prebuild`, which read a run's configuration."""
    run = Parser(add_help=False, parents=[as_json])
    run.add_argument(
        "config", type=file_to_read, help="the run's YAML file, such as output_dir/config.yaml"
    )
    run.add_overrides()

    sample = commands.add_parser(
        "sample", parents=[run], help="the exact samples of a training step, decoded"
    )
    which = sample.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=whole(), help="optimizer step, from 1 as in metrics.jsonl")
    which.add_argument("--validation", action="store_true", help="the validation samples")
    sample.add_argument(
        "--characters",
        type=whole(0),
        default=200,
        help="characters of each document (default: 200; 0: all)",
    )

    commands.add_parser(
        "prebuild", parents=[run], help="build the tables of order: megatron beside the token files"
    )


def run_inspect(arguments: argparse.Namespace) -> int:
    dataset = IndexedDataset(arguments.prefix)
    settings = choose_tokenizer(dataset, arguments.tokenizer_type, arguments.tokenizer_model)
    tokenizer = tokenizer_for(dataset, settings)
    content = describe_files(dataset, tokenizer, arguments.documents, arguments.characters)
    if arguments.json:
        print(json.dumps(content))
        return 0

    # Documents follow below, and of PREFIX.json only the tokenizer is worth a line.
    for name, entry in content.items():
        if name not in ("first_documents", "sidecar"):
            print(f"{name:24} {entry}")
    recorded = (content["sidecar"] or {}).get("tokenizer")
    print(f"{'tokenizer':24} {pairs_text(recorded) if recorded else 'not recorded'}")
    beginning = recorded_beginning(content["sidecar"])
    words = "not recorded" if beginning is None else shown_beginning(beginning)
    print(f"{'documents begin':24} {words}")

    if tokenizer is None and content["first_documents"]:
        print(
            "\nThe tokenizer is not at hand, so there is no text: "
            "name its file with --tokenizer-model (a run keeps it in RUN/tokenizer)."
        )
    for document in content["first_documents"]:
        print(f"\ndocument {document['document']}, {document['tokens']} tokens, {document['ids']}")
        if document["text"] is not None:
            print(document["text"])
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    faults_by_prefix: dict[str, list[str]] = {}
    for prefix in arguments.prefix:
        # Files that cannot even be opened are a finding; the others are still checked.
        try:
            faults = problems_of(IndexedDataset(prefix), arguments.vocab_size)
        except DataError as error:
            faults = [str(error)]
        faults_by_prefix[prefix] = faults

        verdict = "faulty" if faults else "good"
        # Hashes are recorded in PREFIX.json, which Megatron's own files do not have.
        if not faults and not IndexedDataset(prefix).sidecar:
            verdict += " (no PREFIX.json: structure only)"
        print(f"{printable(prefix)}: {verdict}", file=sys.stderr)
        for fault in faults:
            print(f"  {fault}", file=sys.stderr)

    good = not any(faults_by_prefix.values())
    if arguments.json:
        print(json.dumps({"pass": good, "problems": faults_by_prefix}))
    return 0 if good else 1


def run_merge(arguments: argparse.Namespace) -> int:
    prefix = arguments.output_prefix
    check_written(arguments.input, [prefix], arguments.overwrite)
    content = merge(arguments.input, prefix)
    report_written({prefix: content}, arguments.json)
    return 0


def check_written(prefixes: Sequence[str], outputs: Sequence[str], overwrite: bool) -> None:
    """Refuse output prefixes that are inputs, the same, there already, or not writable."""
    # A prefix stands for several files, and none of them may be lost.
    input_paths: list[Path] = []
    for prefix in prefixes:
        input_paths += names_of_token_files(prefix)
    output_paths: list[Path] = []
    for prefix in outputs:
        output_paths += names_of_token_files(prefix)
    written = [Output("--output-prefix", path) for path in output_paths]
    check_outputs(written, input_paths, overwrite)


def run_split(arguments: argparse.Namespace) -> int:
    check_written([arguments.prefix], arguments.output_prefix, arguments.overwrite)
    contents = split(arguments.prefix, arguments.shares, arguments.output_prefix)
    report_written(dict(zip(arguments.output_prefix, contents, strict=True)), arguments.json)
    return 0


def report_written(contents: dict[str, dict[str, Any]], as_json: bool) -> None:
    """Print what was written: {prefix: the content of its PREFIX.json}."""
    if as_json:
        print(json.dumps(contents))
        return
    for prefix, content in contents.items():
        counts = f"{content['documents']:,} documents, {content['tokens']:,} tokens"
        print(f"{printable(prefix)}: {counts}")


def run_sample(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    # Every validation reads the same samples, so any step stands for all.
    if arguments.validation:
        samples = describe_step(config, 1, "validation")
    else:
        samples = describe_step_of_run(config, arguments)
    if arguments.json:
        print(json.dumps({"step": arguments.step, "samples": list(samples)}))
        return 0
    for sample in samples:
        place = f"epoch {sample['epoch']}, number {sample['number']}"
        print(f"sample {sample['sample']}: {sample['prefix']}, {place}")
        for document in sample["documents"]:
            start = f"document {document['document']} from token {document['position']}"
            print(f"  {start}, {len(document['tokens'])} tokens")
            print(f"    {shown(document, arguments.characters)}")
    return 0


def describe_step_of_run(config: Config, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The samples that a step of the run read, by the run's own record.

    Where the record does not say, the samples that this configuration would read.
    """
    step = arguments.step
    # A run's folder may have been moved, with its record beside its config.yaml.
    folder = Path(arguments.config).parent
    if not (folder / STARTS).exists():
        folder = Path(config.training.output_dir)
    left_out = read_left_out(folder)

    # Overrides ask what other settings would read, which no record can say.
    start = None
    if not arguments.overrides:
        start = start_of(read_starts(folder), step)
    if start is None:
        print(
            f"step {step} as this configuration has it; it is not taken from a run's record",
            file=sys.stderr,
        )
        return describe_step(config, step, "train", left_out)

    record = folder / STARTS
    print(f"step {step} from {record}: the start after step {start.step}", file=sys.stderr)
    config_of_start, numbers = samples_read(start, left_out, step, str(record))
    return describe_step(config_of_start, step, "train", left_out, numbers)


def shown(document: dict[str, Any], characters: int) -> str:
    """A document's text on one line, or its ids without a tokenizer; 0 characters: all of it."""
    content = document["tokens"] if document["text"] is None else document["text"]
    line = repr(content)
    if characters == 0 or len(line) <= characters:
        return line
    return line[:characters] + " ..."


def run_prebuild(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    # The tables depend on the number of samples, so they are built for what the run will read.
    samples = {"train": total_samples(config.training)}
    if has_validation(config.data):
        samples["validation"] = config.training.validation_samples
    folders: list[tuple[Any, bool]] = []
    for split_name, count in samples.items():
        folders += prebuild(
            config.data,
            seq_length=config.model.seq_length,
            total_samples=count,
            split=split_name,
        )

    if arguments.json:
        records = [{"path": str(path), "built": built} for path, built in folders]
        print(json.dumps({"folders": records}))
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
    arguments = parse_arguments(argv)
    return COMMANDS[arguments.command](arguments)


if __name__ == "__main__":
    exit_on_user_error(main)
