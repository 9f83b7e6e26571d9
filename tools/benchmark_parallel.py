"""Time our data-parallel training step against torch's DDP + ZeroRedundancyOptimizer and FSDP2.

Example:

    OMP_NUM_THREADS=1 python tools/benchmark_parallel.py --processes 2 --precision float32 bf16

The programs take turns in one process group, over gloo on this machine's CPU, one thread a process.
Ratio: our median step time over theirs; below 1 ours is faster. Memory: the most resident memory of
a rank while it builds and runs a program, above what the process had before. The plain model is
made of nn.Linear, nn.LayerNorm and `x + s * f(norm(x))`, with clip_grad_norm_ and fused
torch.optim.AdamW.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from megatron_completep.benchmarks.parallel_benchmark import (
    OURS,
    ParallelComparison,
    ProgramFigures,
    compare_parallel,
)
from megatron_completep.benchmarks.training_benchmark import BenchmarkSettings
from megatron_completep.command_line import Parser, whole
from megatron_completep.config.schema import ModelConfig
from megatron_completep.errors import exit_on_user_error


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--processes", type=whole(1, 1024), default=2, help="data-parallel ranks (default: 2)"
    )
    parser.add_argument("--layers", type=whole(1, 10**7), default=8)
    parser.add_argument("--hidden", type=whole(1, 10**7), default=256)
    parser.add_argument("--heads", type=whole(1, 10**7), default=4)
    parser.add_argument("--vocabulary", type=whole(1, 10**7), default=4096)
    parser.add_argument("--sequence", type=whole(1, 10**7), default=256, help="tokens a sequence")
    parser.add_argument(
        "--batch", type=whole(1, 10**7), default=8, help="sequences a rank and step (default: 8)"
    )
    parser.add_argument("--precision", nargs="+", choices=("float32", "bf16"), default=["float32"])
    parser.add_argument(
        "--rounds",
        type=whole(1, 10**4),
        default=12,
        help="timed steps of each program (default: 12)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    # GPT-2's architecture.
    model = ModelConfig(
        hidden_size=arguments.hidden,
        num_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        ffn_hidden_size=4 * arguments.hidden,
        vocab_size=arguments.vocabulary,
        seq_length=arguments.sequence,
        norm="layernorm",
        activation="gelu",
        position="learned",
        bias=True,
    )
    # Quartiles need two rounds at least.
    settings = BenchmarkSettings(model, arguments.batch, max(2, arguments.rounds), warmup=2)
    tokens = f"{arguments.batch} x {arguments.sequence} tokens"
    print(
        f"{arguments.processes} ranks over gloo, {tokens} each",
        file=sys.stderr,
        flush=True,
    )
    results = [
        compare_parallel(settings, precision, arguments.processes)
        for precision in arguments.precision
    ]

    if arguments.json:
        comparisons = [result.as_dict() for result in results]
        setting = {"torch": torch.__version__, "model": model.model_dump()}
        print(json.dumps({**setting, "comparisons": comparisons}))
        return 0
    for result in results:
        print(describe(result))
    return 0


def describe(result: ParallelComparison) -> str:
    """A line for each program."""
    lines = [f"{result.precision}, {result.processes} ranks, {result.rounds} rounds"]
    for name, figures in result.programs.items():
        peak = f"peak {figures.peak_bytes / 1e6:,.0f} MB a rank"
        versus = "" if name == OURS else f"   {describe_ratio(figures)}"
        lines.append(f"  {name:<30}{describe_times(figures)}   {peak}{versus}")
    return "\n".join(lines)


def describe_times(figures: ProgramFigures) -> str:
    milliseconds = 1000 * figures.seconds
    quartiles = f"{1000 * figures.lower_quartile:.0f} to {1000 * figures.upper_quartile:.0f}"
    return f"{milliseconds:8.0f} ms a step (quartiles {quartiles})"


def describe_ratio(figures: ProgramFigures) -> str:
    interval = f"95 %: {figures.ratio_low:.3f} to {figures.ratio_high:.3f}"
    processor = f"in processor time {figures.cpu_time_ratio:.3f}"
    return f"ours / this = {figures.ratio:.3f} ({interval}; {processor})"


if __name__ == "__main__":
    exit_on_user_error(main)
