"""Turn a Hugging Face folder into a checkpoint and a configuration, to train on.

Llama (1 to 3.3), Qwen2, Qwen2.5, Qwen3, Mistral (without a window), Granite and GPT-2; with experts
Mixtral and GraniteMoe(Shared).

Example, continued training:

    python tools/import_hf.py downloads/granite-3.3-2b-base runs/granite \\
        optimizer.base_lr=1e-5 training.train_steps=2000
    python -m megatron_completep.pretrain runs/granite/config.yaml \\
        data.train='[{prefix: data/mine_text_document}]'

OUT gets config.yaml, the tokenizer and checkpoints/step_00000000, which any layout loads. Words
section.key=value set the configuration. Weights are read from safetensors only, never from pickles
(.bin).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_completep.command_line import Parser, folder_to_read, whole
from megatron_completep.errors import exit_on_user_error
from megatron_completep.interop.import_model import import_model
from megatron_completep.outputs import Output, check_outputs


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "folder",
        type=folder_to_read,
        metavar="FOLDER",
        help="with config.json and .safetensors files",
    )
    parser.add_argument(
        "output", type=Path, metavar="OUT", help="folder of the run to be; must not hold one"
    )
    parser.add_overrides("settings of the configuration")
    parser.add_argument(
        "--seq-length",
        type=whole(1, 10**8),
        metavar="N",
        help="tokens a training sample (default: the model's longest)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    # An OUT that is FOLDER itself would mix the files of both.
    check_outputs([Output("OUT", arguments.output, folder=True)], [arguments.folder])
    report = import_model(
        arguments.folder, arguments.output, arguments.overrides, arguments.seq_length
    )
    if arguments.json:
        print(json.dumps(report.to_json()))
        return 0
    size = f"{report.parameters:,} parameters, {report.dtype}"
    print(f"{report.architecture}, {size}: {report.checkpoint}")
    for note in report.notes:
        print(f"  {note}")
    print(f"Set data, learning rate and lengths in {report.config}, then train:")
    print(f"  python -m megatron_completep.pretrain {report.config}")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
