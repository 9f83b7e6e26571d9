"""Time our training step against a plain torch model of the same shape.

Example:

    python tools/benchmark_training.py
    python tools/benchmark_training.py --quick --precision float32
    python tools/benchmark_training.py --layers 24 --hidden 2048 --heads 16 --sequence 2048 \\
        --batch 4 --vocabulary 50304 --device cuda --kinds swiglu --compile

Two kinds of model (layernorm, gelu, learned positions, biases; rmsnorm, swiglu, rope), two
precisions, and four programs that take turns in one run: ours and the plain one, each with and
without compilation. The plain model is made of nn.Linear, nn.LayerNorm and `x + s * f(norm(x))`,
with clip_grad_norm_ and fused torch.optim.AdamW. Ratio: our median step time over the plain one's;
below 1 ours is faster. Model FLOPs as stated in megatron_completep/model/flops.py.

On a CPU a sweep follows: the points of `lr_transfer.py sweep` that all cores train in an hour, at
the shape of a proxy (16 layers x 64), beside the same points by a plain loop, both compiled.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from megatron_completep.benchmarks.sweep_benchmark import (
    SweepComparison,
    SweepSettings,
    compare_sweeps,
)
from megatron_completep.benchmarks.training_benchmark import (
    COMPILED,
    KINDS,
    PROGRAMS,
    BenchmarkSettings,
    Comparison,
    Timing,
    compare_all,
)
from megatron_completep.command_line import Parser, whole
from megatron_completep.config.schema import ModelConfig
from megatron_completep.errors import exit_on_user_error
from megatron_completep.instruments.sweep import default_workers
from megatron_completep.parallel.context import choose_device
from megatron_completep.run.precision import use_threads
from megatron_completep.training.build import device_name

ROUNDS = 20
QUICK_ROUNDS = 5
OWN_KIND = ("norm", "activation", "position", "bias")  # options that describe one other kind


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
    shape.add_argument("--kinds", nargs="+", choices=tuple(KINDS), help="(default: both)")
    # Any of these makes one kind of its own; what is not given is as in the first kind.
    shape.add_argument("--norm", choices=("layernorm", "rmsnorm"))
    shape.add_argument("--activation", choices=("gelu", "squared_relu", "swiglu"))
    shape.add_argument("--position", choices=("learned", "rope"))
    shape.add_argument("--no-bias", action="store_const", const=False, dest="bias")
    parser.add_argument(
        "--batch", type=whole(1, 10**7), default=8, help="sequences a step (default: 8)"
    )
    parser.add_argument(
        "--precision", nargs="+", choices=("float32", "bf16"), default=["float32", "bf16"]
    )
    parser.add_argument(
        "--plain-bf16",
        choices=("autocast", "pure"),
        help="how the plain model computes in bf16 (default: autocast)",
    )
    parser.add_argument(
        "--rounds",
        type=whole(2, 10**4),
        help=f"timed steps of each program (default: {ROUNDS})",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=whole(1, 4096), help="CPU threads (default: all cores)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="only the two programs with torch.compile, or only those without (default: all)",
    )
    parser.add_argument("--no-sweep", action="store_true", help="leave the sweep out")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds, and no sweep")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args(argv)
    if arguments.kinds and any(getattr(arguments, name) is not None for name in OWN_KIND):
        parser.error("--kinds names kinds of model, and a further option makes one: give one alone")
    if arguments.plain_bf16 and "bf16" not in arguments.precision:
        parser.error("--plain-bf16 says how the plain model computes in bf16, which is not timed")
    arguments.kinds = arguments.kinds or list(KINDS)
    arguments.plain_bf16 = arguments.plain_bf16 or "autocast"
    return arguments


def models(arguments: argparse.Namespace) -> dict[str, ModelConfig]:
    """The models that are timed, by the name of their kind."""
    own = {name: getattr(arguments, name) for name in OWN_KIND}
    given = {name: choice for name, choice in own.items() if choice is not None}
    if given:
        return {"own": _model(arguments, {**KINDS["gelu"], **given})}
    return {kind: _model(arguments, KINDS[kind]) for kind in arguments.kinds}


def _model(arguments: argparse.Namespace, kind: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        hidden_size=arguments.hidden,
        num_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        ffn_hidden_size=arguments.ffn or 4 * arguments.hidden,
        vocab_size=arguments.vocabulary,
        seq_length=arguments.sequence,
        **kind,
    )


def programs(arguments: argparse.Namespace) -> list[str]:
    """The names of the programs that take turns."""
    return [name for name in PROGRAMS if arguments.compile in (None, name.endswith(COMPILED))]


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    device = choose_device(arguments.device, 0)
    threads = use_threads(arguments.threads, 1)
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    place = device_name(device)
    if device.type == "cpu":
        place += f", {threads} threads"

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    say(
        f"{place}, torch {torch.__version__}; batch {arguments.batch} x {arguments.sequence} tokens"
    )
    results: list[tuple[str, Comparison]] = []
    for kind, model in models(arguments).items():
        settings = BenchmarkSettings(
            model,
            arguments.batch,
            rounds=rounds,
            plain_bf16=arguments.plain_bf16,
        )
        for precision in arguments.precision:
            # What was compiled for the model before counts towards the compiler's limits.
            torch.compiler.reset()
            say(kind)
            compared = compare_all(settings, precision, device, programs(arguments), say)
            results += [(kind, comparison) for comparison in compared]
    sweep: SweepComparison | None = None
    if device.type == "cpu" and not (arguments.no_sweep or arguments.quick):
        sweep = compare_sweeps(proxy_sweep(default_workers("cpu")), say)

    if arguments.json:
        print(json.dumps(as_object(arguments, place, results, sweep)))
        return 0
    for line in report(results, sweep):
        print(line)
    return 0


def proxy_sweep(workers: int) -> SweepSettings:
    """The sweep that is timed: a deep and narrow proxy."""
    model = ModelConfig(
        hidden_size=64,
        num_layers=16,
        num_attention_heads=2,
        ffn_hidden_size=256,
        vocab_size=4096,
        seq_length=128,
        **KINDS["swiglu"],
    )
    return SweepSettings(model, workers=workers)


def as_object(
    arguments: argparse.Namespace,
    place: str,
    results: Sequence[tuple[str, Comparison]],
    sweep: SweepComparison | None,
) -> dict[str, Any]:
    """What --json prints."""
    shapes = {kind: model.model_dump() for kind, model in models(arguments).items()}
    return {
        "device": place,
        "torch": torch.__version__,
        "models": shapes,
        "comparisons": [{"kind": kind, **result.as_dict()} for kind, result in results],
        "sweep": sweep and sweep.as_dict(),
    }


def report(results: Sequence[tuple[str, Comparison]], sweep: SweepComparison | None) -> list[str]:
    """The lines for a person: the programs of each kind and precision, then their ratios."""
    lines = []
    title = ""
    shown: set[str] = set()
    for kind, result in results:
        if title != f"{kind}, {result.precision}":
            title = f"{kind}, {result.precision}"
            shown = set()
            lines.append(f"{title} ({result.rounds} rounds)")
        for name, timing in zip(result.names, (result.ours, result.plain), strict=True):
            if name not in shown:
                shown.add(name)
                lines.append(f"  {name:16}{describe_timing(timing)}")
        lines.append(f"  {describe_ratio(result)}")
    if sweep is not None:
        lines += [
            f"sweep, {sweep.workers} workers ({sweep.points} points)",
            f"  ours, compiled  {sweep.our_points_an_hour:8,.0f} points an hour",
            f"  plain, compiled {sweep.plain_points_an_hour:8,.0f} points an hour",
            f"  ours / plain: {sweep.ratio:.3f} of the time a point   "
            f"(95 %: {sweep.ratio_low:.3f} to {sweep.ratio_high:.3f}; "
            f"in processor time {sweep.cpu_time_ratio:.3f})",
        ]
    return lines


def describe_ratio(result: Comparison) -> str:
    sure = f"95 %: {result.ratio_low:.3f} to {result.ratio_high:.3f}"
    if result.cpu_time_ratio is not None:
        sure += f"; in processor time {result.cpu_time_ratio:.3f}"
    ours, plain = result.names
    return f"{ours} / {plain}: {result.ratio:.3f}   ({sure})"


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
