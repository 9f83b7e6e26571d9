"""Time our training step against a plain torch model of the same shape.

Example:

    python tools/benchmark_training.py --precision float32 bf16
    python tools/benchmark_training.py --layers 24 --hidden 2048 --heads 16 --sequence 2048 \\
        --batch 4 --vocabulary 50304 --device cuda

The two take turns in one run. The plain model is made of nn.Linear, nn.LayerNorm and
`x + s * f(norm(x))`, with clip_grad_norm_ and fused torch.optim.AdamW. Ratio: our median step time
over the plain one's; below 1 ours is faster. Model FLOPs as stated in
megatron_completep/model/flops.py.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from megatron_completep.benchmarks.training_benchmark import (
    BenchmarkSettings,
    Comparison,
    Timing,
    compare,
)
from megatron_completep.command_line import Parser, whole
from megatron_completep.config.schema import ModelConfig
from megatron_completep.errors import exit_on_user_error
from megatron_completep.parallel.context import choose_device
from megatron_completep.run.precision import use_threads
from megatron_completep.training.build import device_name


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    shape = parser.add_argument_group("model shape")
    shape.add_argument("--layers", type=whole(1, 10**7), default=8)
    shape.add_argument("--hidden", type=whole(1, 10**7), default=256)
    shape.add_argument("--heads", type=whole(1, 10**7), default=4)
    shape.add_argument(
        "--ffn", type=whole(1, 10**7), help="inner width of the MLP (default: 4 times hidden)"
    )
    shape.add_argument("--vocabulary", type=whole(1, 10**7), default=4096)
    shape.add_argument("--sequence", type=whole(1, 10**7), default=256, help="tokens a sequence")
    shape.add_argument("--norm", choices=("layernorm", "rmsnorm"), default="layernorm")
    shape.add_argument("--activation", choices=("gelu", "squared_relu", "swiglu"), default="gelu")
    shape.add_argument("--position", choices=("learned", "rope"), default="learned")
    shape.add_argument("--no-bias", action="store_true")
    parser.add_argument(
        "--batch", type=whole(1, 10**7), default=8, help="sequences a step (default: 8)"
    )
    parser.add_argument(
        "--precision", nargs="+", choices=("float32", "bf16"), default=["float32", "bf16"]
    )
    parser.add_argument(
        "--plain-bf16",
        choices=("autocast", "pure"),
        default="autocast",
        help="how the plain model computes in bf16",
    )
    parser.add_argument(
        "--rounds",
        type=whole(1, 10**4),
        default=20,
        help="timed steps of each program (default: 20)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=whole(1, 4096), help="CPU threads (default: all cores)")
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser.parse_args(argv)


def model_config(arguments: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        hidden_size=arguments.hidden,
        num_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        ffn_hidden_size=arguments.ffn or 4 * arguments.hidden,
        vocab_size=arguments.vocabulary,
        seq_length=arguments.sequence,
        norm=arguments.norm,
        activation=arguments.activation,
        position=arguments.position,
        bias=not arguments.no_bias,
    )


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    model = model_config(arguments)
    device = choose_device(arguments.device, 0)
    threads = use_threads(arguments.threads, 1)
    settings = BenchmarkSettings(
        model,
        arguments.batch,
        rounds=max(2, arguments.rounds),  # quartiles need two at least
        compile=arguments.compile,
        plain_bf16=arguments.plain_bf16,
    )
    place = device_name(device)
    if device.type == "cpu":
        place += f", {threads} threads"

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    tokens = f"{arguments.batch} x {arguments.sequence} tokens"
    say(f"{place}, torch {torch.__version__}; batch {tokens}")
    results = [compare(settings, precision, device, say) for precision in arguments.precision]

    if arguments.json:
        setting = {"device": place, "torch": torch.__version__, "model": model.model_dump()}
        comparisons = [result.as_dict() for result in results]
        print(json.dumps({**setting, "comparisons": comparisons}))
        return 0
    for result in results:
        print(describe(result))
    return 0


def describe(result: Comparison) -> str:
    """A few lines for a person."""
    sure = f"95 % of {result.rounds} rounds: {result.ratio_low:.3f} to {result.ratio_high:.3f}"
    if result.cpu_time_ratio is not None:
        sure += f"; in processor time {result.cpu_time_ratio:.3f}"
    lines = [
        f"{result.precision}: ours / plain = {result.ratio:.3f}   ({sure})",
        f"  ours   {describe_timing(result.ours)}",
        f"  plain  {describe_timing(result.plain)}",
    ]
    return "\n".join(lines)


def describe_timing(timing: Timing) -> str:
    milliseconds = 1000 * timing.median
    quartiles = f"{1000 * timing.lower_quartile:.1f} to {1000 * timing.upper_quartile:.1f}"
    gigaflops = timing.model_flops_per_second / 1e9
    figures = [
        f"{milliseconds:8.1f} ms a step (quartiles {quartiles})",
        f"{timing.tokens_per_second:,.0f} tokens/s",
        f"{gigaflops:,.1f} model GFLOP/s",
    ]
    if timing.mfu is not None:
        figures.append(f"mfu {100 * timing.mfu:.1f} %")
    return "   ".join(figures)


if __name__ == "__main__":
    exit_on_user_error(main)
