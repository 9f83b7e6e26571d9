"""Continue a text with a trained model.

Example:

    python tools/generate.py runs/quickstart --prompt "def main(" --max-new-tokens 200 --temperature 0.7

CHECKPOINT is a run's folder (its newest checkpoint) or one of its checkpoints/step_NNNNNNNN. Text appears as it is made; the same
seed gives the same text.
"""

import argparse
import json
import sys
import time

import torch

from megatron_completep.config.schema import TokenizerConfig
from megatron_completep.data.tokenizer import build_tokenizer
from megatron_completep.errors import ConfigError, exit_on_user_error
from megatron_completep.parallel.context import choose_device
from megatron_completep.training.generation import Sampling, generate_text, load_model
from megatron_completep.training.precision import choose_precision, use_threads


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, or one checkpoint's")
    parser.add_argument("--prompt", default="", help="text to continue; - reads standard input (default: begin a document)")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="draw from the likeliest tokens of this share (default: 0.95)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="default: 1234")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="texts to make (default: 1)")
    parser.add_argument("--tokenizer-model", metavar="FILE", help="where the tokenizer lies now, if not where the run found it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "float32", "bf16", "float64"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of streaming")
    return parser.parse_args()


def main() -> int | None:
    arguments = parse_arguments()
    sampling = Sampling(arguments.temperature, arguments.top_p, arguments.max_new_tokens)
    device = choose_device(arguments.device, 0)
    use_threads(None, 1)
    config, model = load_model(arguments.checkpoint, device, choose_precision(arguments.precision, device))
    settings = config.data.tokenizer
    if settings is None:
        raise ConfigError("the run has no data.tokenizer, so its tokens cannot be turned into text.")
    if arguments.tokenizer_model is not None:
        settings = TokenizerConfig(type=settings.type, model=arguments.tokenizer_model)
    tokenizer = build_tokenizer(settings)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    generator = torch.Generator(device).manual_seed(arguments.seed)
    texts, started = [], time.perf_counter()
    for number in range(arguments.samples):
        if not arguments.json:
            print(f"{'' if number == 0 else chr(10)}{prompt}", end="", flush=True)
        pieces = []
        for piece in generate_text(model, tokenizer, prompt, sampling, generator):
            pieces.append(piece)
            if not arguments.json:
                print(piece, end="", flush=True)
        texts.append("".join(pieces))
        if not arguments.json:
            print()
    if arguments.json:
        print(json.dumps({"prompt": prompt, "texts": texts, "seconds": time.perf_counter() - started}))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
