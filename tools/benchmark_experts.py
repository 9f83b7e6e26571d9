"""Time a step with experts beside that of a dense model with as many active FLOPs.

Example, 2 of 8 experts as wide as the model, 2,048 tokens:

    python tools/benchmark_experts.py configs/quickstart_proxy.yaml training.cpu_threads=1 \\
        'model.moe={num_experts: 8, top_k: 2, ffn_hidden_size: 256}' model.seq_length=256 \\
        training.micro_batch_size=8 training.global_batch_size=8

The model and the batch are the configuration's; tokens are random and no data file is opened. The
two take turns in one process. Printed: the processor time of both steps (on a GPU the clock's), and
their ratio.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_completep.benchmarks.expert_benchmark import measure
from megatron_completep.benchmarks.run_benchmark import parse_arguments as parse_shared
from megatron_completep.benchmarks.run_benchmark import run_benchmark
from megatron_completep.errors import exit_on_user_error


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return parse_shared(__doc__, "timed steps of each", argv)


def main(argv: Sequence[str] | None = None) -> int | None:
    run_benchmark(parse_arguments(argv), measure)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
