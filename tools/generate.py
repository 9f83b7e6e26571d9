"""Continue texts with a trained model.

Example:

    python tools/generate.py runs/quickstart --prompt "def main(" --max-new-tokens 200 --temperature 0.7
    python tools/generate.py runs/quickstart --prompts prompts.txt --batch-size 16 --json > texts.json

CHECKPOINT is a run's folder (its newest checkpoint) or one of its checkpoints/step_NNNNNNNN. Text appears as it is made.
--prompts reads a prompt a line, or from a .jsonl file the key "prompt".

The same seed gives the same texts on the same device. In float32 and float64 the batch size does not matter (rounding turns one draw in
a million at most); in bf16 it does, for another batch rounds logits differently: give the same --batch-size and prompts, or
--precision float32.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_completep.command_line import (
    Parser,
    file_to_read,
    folder_to_read,
    real,
    tokenizer_model,
    whole,
)
from megatron_completep.config.json_text import parse_json
from megatron_completep.data.tokenizer import Tokenizer, build_tokenizer
from megatron_completep.errors import DataError, exit_on_user_error
from megatron_completep.inference.generation import (
    Sampling,
    generate_texts,
    load_model,
    run_config,
    run_tokenizer,
)
from megatron_completep.model.gpt import GPT
from megatron_completep.parallel.context import choose_device
from megatron_completep.run.precision import name_of, precision_of_run, use_threads


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "checkpoint",
        type=folder_to_read,
        metavar="CHECKPOINT",
        help="a run's folder, or one checkpoint's",
    )
    parser.add_argument(
        "--prompt",
        default="",
        help="text to continue; - reads standard input (default: begin a document)",
    )
    parser.add_argument(
        "--prompts",
        type=file_to_read,
        metavar="FILE",
        help="many texts to continue, instead of --prompt",
    )
    parser.add_argument(
        "--batch-size",
        type=whole(1, 10**6),
        default=8,
        metavar="N",
        help="texts made at once (default: 8)",
    )
    parser.add_argument(
        "--max-new-tokens", type=whole(0, 10**7), default=100, metavar="N", help="default: 100"
    )
    parser.add_argument(
        "--temperature",
        type=real(at_least=0),
        default=0.8,
        help="0: always the likeliest token (default: 0.8)",
    )
    parser.add_argument(
        "--top-k",
        type=whole(0),
        default=0,
        metavar="K",
        help="draw from the K likeliest tokens (default: 0, all)",
    )
    parser.add_argument(
        "--top-p",
        type=real(above=0, at_most=1),
        default=0.95,
        metavar="P",
        help="draw from the likeliest tokens of this share (default: 0.95)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=real(above=0),
        default=1.0,
        metavar="R",
        help="above 1: fewer repetitions (default: 1)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end after this text; may be given several times",
    )
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), default=1234, help="default: 1234")
    parser.add_argument(
        "--samples",
        type=whole(1, 10**6),
        default=1,
        metavar="N",
        help="texts to make of each prompt (default: 1)",
    )
    parser.add_argument(
        "--tokenizer-model",
        type=tokenizer_model,
        metavar="FILE",
        help="instead of the run's own copy of its tokenizer",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bf16", "float64"),
        default="auto",
        help="auto: that of the run, where the device can",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout instead of streaming"
    )
    return parser.parse_args(argv)


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """All prompts. Raises DataError naming file and line."""
    if arguments.prompts is None:
        return [sys.stdin.read() if arguments.prompt == "-" else arguments.prompt]
    path: Path = arguments.prompts
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    if path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, start=1):
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise DataError(
                f'{path}, line {number}: expected an object with the key "prompt" and a text.'
            )
        prompts.append(row["prompt"])
    return prompts


def say(text: str) -> None:
    print(text, file=sys.stderr)


def make_texts(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], arguments: argparse.Namespace
) -> list[str]:
    """A text for each prompt. One alone streams to the console; of several each is printed when its batch is done."""
    sampling = Sampling(
        arguments.temperature,
        arguments.top_p,
        arguments.max_new_tokens,
        arguments.top_k,
        arguments.repetition_penalty,
    )
    device = next(model.parameters()).device
    texts: list[str] = []
    for start in range(0, len(prompts), arguments.batch_size):
        batch = prompts[start : start + arguments.batch_size]
        generators = [
            torch.Generator(device).manual_seed(arguments.seed + start + i)
            for i in range(len(batch))
        ]
        made = [""] * len(batch)
        streaming = len(batch) == 1 and not arguments.json
        if streaming:
            print(batch[0], end="", flush=True)
        for number, piece in generate_texts(
            model, tokenizer, batch, sampling, generators, [arguments.stop] * len(batch)
        ):
            made[number] += piece
            if streaming:
                print(piece, end="", flush=True)
        if streaming:
            print()
        elif not arguments.json:
            print(
                "\n\n".join(prompt + text for prompt, text in zip(batch, made, strict=True)),
                end="\n\n",
            )
        texts += made
    return texts


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    device = choose_device(arguments.device, 0)
    use_threads(None, 1)
    prompts = read_prompts(arguments)
    trained = run_config(arguments.checkpoint).training.precision
    precision = precision_of_run(arguments.precision, trained, device, say)
    if (
        precision == torch.bfloat16
        and arguments.batch_size > 1
        and len(prompts) * arguments.samples > 1
    ):
        say(
            "in bf16 the texts of a seed depend on --batch-size and on the prompts beside them; --precision float32 removes that."
        )
    config, model = load_model(arguments.checkpoint, device, precision)
    settings = run_tokenizer(arguments.checkpoint, config, arguments.tokenizer_model)
    started = time.perf_counter()
    wanted = [prompt for prompt in prompts for _ in range(arguments.samples)]
    texts = make_texts(model, build_tokenizer(settings), wanted, arguments)
    if arguments.json:
        n = arguments.samples
        results = [
            {"prompt": prompt, "texts": texts[i * n : (i + 1) * n]}
            for i, prompt in enumerate(prompts)
        ]
        print(
            json.dumps(
                {
                    "results": results,
                    "precision": name_of(precision),
                    "seconds": time.perf_counter() - started,
                }
            )
        )
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
