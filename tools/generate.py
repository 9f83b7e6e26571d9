"""Continue texts with a trained model.

Example:

    python tools/generate.py runs/quickstart --prompt "def main(" --max-new-tokens 200 \\
        --temperature 0.7
    python tools/generate.py runs/quickstart --prompts prompts.txt --batch-size 16 \\
        --json > texts.json

CHECKPOINT is a run's folder (its newest checkpoint) or one of its checkpoints/step_NNNNNNNN. Text
appears as it is made. --prompts reads a prompt a line, or from a .jsonl file the key "prompt".

The same seed gives the same texts on the same device. In float32 and float64 the batch size does
not matter (rounding turns one draw in a million at most); in bf16 it does, for another batch rounds
logits differently: give the same --batch-size and prompts, or --precision float32.
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
    tokenizer_of_run,
)
from megatron_completep.model.gpt import GPT
from megatron_completep.parallel.context import choose_device
from megatron_completep.run.precision import name_of, precision_of_run, use_threads


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    _add_inputs(parser)
    _add_sampling(parser)
    _add_computation(parser)
    return parser.parse_args(argv)


def _add_inputs(parser: Parser) -> None:
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


def _add_sampling(parser: Parser) -> None:
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


def _add_computation(parser: Parser) -> None:
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


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """All prompts. Raises DataError naming file and line."""
    if arguments.prompts is None:
        return [sys.stdin.read() if arguments.prompt == "-" else arguments.prompt]
    path: Path = arguments.prompts
    # A text that is not UTF-8 would decode to other tokens than the user means.
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    # Not `splitlines`, which also splits at a form feed, or at U+2028 inside a JSON string.
    lines = text.removesuffix("\n").split("\n") if text else []
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


def say(line: str) -> None:
    print(line, file=sys.stderr)


def make_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    end_tokens: Sequence[int],
    arguments: argparse.Namespace,
) -> list[str]:
    """A text for each prompt, and on stdout prompts and texts, unless --json is given.

    A prompt that is alone in its batch streams to the console; the texts of a larger batch are
    printed when it is done.
    """
    texts: list[str] = []
    for start in range(0, len(prompts), arguments.batch_size):
        batch = prompts[start : start + arguments.batch_size]
        # A prompt's draws depend on its number only, not on the batch that it falls into.
        seeds = [arguments.seed + start + position for position in range(len(batch))]
        streaming = len(batch) == 1 and not arguments.json
        batch_texts = make_batch(model, tokenizer, batch, seeds, end_tokens, streaming, arguments)
        if not streaming and not arguments.json:
            continued = [prompt + added for prompt, added in zip(batch, batch_texts, strict=True)]
            print("\n\n".join(continued), end="\n\n")
        texts += batch_texts
    return texts


def make_batch(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    seeds: Sequence[int],
    end_tokens: Sequence[int],
    streaming: bool,
    arguments: argparse.Namespace,
) -> list[str]:
    """A text for each of these prompts, made at once; with `streaming` printed as they grow."""
    sampling = Sampling(
        arguments.temperature,
        arguments.top_p,
        arguments.max_new_tokens,
        arguments.top_k,
        arguments.repetition_penalty,
    )
    # Draws are made where the logits are, each text's with a generator of its own.
    device = next(model.parameters()).device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    stops = [arguments.stop] * len(prompts)
    if streaming:
        print(prompts[0], end="", flush=True)

    texts = [""] * len(prompts)
    for number, new_text in generate_texts(
        model, tokenizer, prompts, sampling, generators, stops, end_tokens
    ):
        texts[number] += new_text
        if streaming:
            print(new_text, end="", flush=True)
    if streaming:
        print()
    return texts


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    device = choose_device(arguments.device, 0)
    use_threads(None, 1)
    prompts = read_prompts(arguments)
    # The configuration alone decides the precision, before the weights are read in it.
    precision_of_training = run_config(arguments.checkpoint).training.precision
    precision = precision_of_run(arguments.precision, precision_of_training, device, say)

    # Another batch makes other matrix products, which bf16 rounds coarsely enough to turn draws.
    several_texts = len(prompts) * arguments.samples > 1
    if precision == torch.bfloat16 and arguments.batch_size > 1 and several_texts:
        say(
            "in bf16 the texts of a seed depend on --batch-size and on the prompts beside them; "
            "--precision float32 removes that."
        )

    config, model = load_model(arguments.checkpoint, device, precision)
    settings = tokenizer_of_run(arguments.checkpoint, config, arguments.tokenizer_model)
    # The seconds are those of the texts; the model is loaded by now.
    started = time.perf_counter()
    samples = arguments.samples
    repeated_prompts: list[str] = []
    for prompt in prompts:
        # Samples of a prompt stand together, so that below a slice is what belongs to it.
        repeated_prompts += [prompt] * samples
    tokenizer = build_tokenizer(settings)
    end_tokens = config.export.end_tokens()
    texts = make_texts(model, tokenizer, repeated_prompts, end_tokens, arguments)
    if not arguments.json:
        return 0

    results = []
    for number, prompt in enumerate(prompts):
        prompt_texts = texts[number * samples : (number + 1) * samples]
        results.append({"prompt": prompt, "texts": prompt_texts})
    seconds = time.perf_counter() - started
    answer = {"results": results, "precision": name_of(precision), "seconds": seconds}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
