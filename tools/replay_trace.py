"""Replay a recorded run of the CompleteP authors' code, and say whether the numbers agree.

Example:

    python tools/replay_trace.py tests/golden/completep --precision float64
    python tools/replay_trace.py tests/golden/completep --precision float32 --device cuda

TRACE is a pair NAME.json and NAME.npz: the path without suffix, or either file. Exit code 1 when
the replay does not agree.
"""

import argparse
import json
from collections.abc import Sequence

import torch

from megatron_completep.command_line import Parser, file_or_folder
from megatron_completep.errors import ConfigError, exit_on_user_error
from megatron_completep.instruments.replay import TOLERANCES, Replay, Trace, replay
from megatron_completep.parallel.context import ParallelContext


def _trace(path: str) -> str:
    """The path without suffix, or either file; none of them a pipe."""
    # Which of the three exists is for the loader to find out.
    for suffix in ("", ".json", ".npz"):
        file_or_folder(f"{path}{suffix}")
    return path


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "trace",
        type=_trace,
        metavar="TRACE",
        help="path of the trace, with or without .json or .npz",
    )
    parser.add_argument(
        "--precision", choices=tuple(TOLERANCES), default="float64", help="default: float64"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="default: cpu, whose float64 is the reference",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parse_arguments(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU. Leave the option out.")
    context = ParallelContext.single("cuda:0" if arguments.device == "cuda" else "cpu")
    result = replay(Trace.load(arguments.trace), arguments.precision, context)
    print(json.dumps(result.to_json()) if arguments.json else describe(result, arguments.precision))
    return 0 if result.passed else 1


def describe(result: Replay, precision: str) -> str:
    """A line a step, then the largest differences beside what is allowed."""
    lines = [f"{'step':>4}  {'loss':>18}  {'recorded':>18}  {'difference':>10}"]
    losses = zip(result.loss, result.recorded_loss, strict=False)
    for step, (loss, recorded) in enumerate(losses, start=1):
        lines.append(f"{step:>4}  {loss:>18.15f}  {recorded:>18.15f}  {loss - recorded:>10.1e}")

    lines.append(f"{'largest relative difference':<32}{'found':>9}{'allowed':>10}")
    errors = {
        "loss": result.max_relative_loss_error,
        "gradient norm": result.max_relative_grad_norm_error,
        "final weight norms": result.max_relative_weight_norm_error,
    }
    bounds = TOLERANCES[precision]
    # The tolerances stand in the order of these three errors.
    for (name, error), bound in zip(errors.items(), bounds, strict=True):
        lines.append(f"  {name:<30}{error:>9.1e}{bound:>10.0e}")

    verdict = "fail"
    if result.passed:
        verdict = "pass: this installation computes what the authors' code computes"
    return "\n".join([*lines, f"{verdict} ({precision}, {len(result.loss)} steps)"])


if __name__ == "__main__":
    exit_on_user_error(main)
