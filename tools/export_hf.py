"""Write a checkpoint as a folder that stock transformers and vLLM load, without remote code.

Example:

    python tools/export_hf.py runs/quickstart exported/quickstart --check

CHECKPOINT is a run's folder (its newest checkpoint) or one of its checkpoints/step_NNNNNNNN, of any
layout; one CPU process reads it tensor by tensor. The multipliers of CompleteP are kept where the
architecture has them (Granite), else folded into the tensors.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_completep.command_line import Parser, folder_to_read, tokenizer_model
from megatron_completep.errors import UserError, exit_on_user_error
from megatron_completep.interop.architectures import ARCHITECTURES
from megatron_completep.interop.check_export import check_export, check_tokenizer
from megatron_completep.interop.export_model import (
    ALIASES,
    ExportSettings,
    export_model,
    parse_size,
)
from megatron_completep.interop.tensor_files import DTYPES
from megatron_completep.outputs import Output, check_outputs
from megatron_completep.run.precision import use_threads


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "checkpoint",
        type=folder_to_read,
        metavar="CHECKPOINT",
        help="a run's folder, or one checkpoint's",
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("--architecture", choices=("auto", *ARCHITECTURES), default="auto")
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES, *ALIASES),
        default="auto",
        help="auto: that of the run's precision",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of one tensor file (default: 5GB)"
    )
    parser.add_argument(
        "--tokenizer-model",
        type=tokenizer_model,
        metavar="FILE",
        help="where the tokenizer lies now; none: export without one",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare logits and tokens with transformers' own code (needs memory for the model)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    use_threads(None, 1)
    # A size that cannot be understood is refused here, before the checkpoint is read.
    settings = ExportSettings(
        arguments.architecture,
        arguments.dtype,
        arguments.tokenizer_model,
        parse_size(arguments.max_shard_size),
    )
    check_outputs([Output("OUT", arguments.output, folder=True)])

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    report = export_model(arguments.checkpoint, arguments.output, settings, say=say)
    comparison = None
    result = report.to_json()
    if arguments.check:
        comparison = check_export(report.checkpoint, report.folder, report.dtype)
        result["check"] = {**vars(comparison), "equal": comparison.equal}
        if report.tokenizer is not None:
            chosen = arguments.tokenizer_model
            texts = check_tokenizer(report.checkpoint, report.folder, chosen)
            result["check"]["texts"] = texts

    if arguments.json:
        print(json.dumps(result))
    else:
        size = f"{report.parameters:,} parameters in {report.dtype}"
        print(f"wrote {report.folder}: {report.architecture}, {size}, {len(report.files)} files")
        if comparison is not None:
            print(
                "difference of logits to transformers': "
                f"{comparison.relative_difference:.2e} of the largest logit"
            )
            if "texts" in result["check"]:
                print(f"{result['check']['texts']:,} texts are encoded by transformers alike")

    # Only now, so that the figures are printed in any case.
    if comparison is not None and not comparison.equal:
        raise UserError(
            f"{report.folder} does not compute what the checkpoint does: "
            f"more than {comparison.tolerance:g}. Report this."
        )
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
