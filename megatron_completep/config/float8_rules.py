"""With what `training.float8 = tensorwise` does not go (parallel/float8.py)."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_completep.config.remedies import Problem
from megatron_completep.config.schema import Config

WHERE = "training.float8 = tensorwise"
REMEDY = "training.float8 = none"
MULTIPLE = 16  # of which every dimension of a product must be one


def float8_problems(config: Config) -> Iterator[Problem]:
    """Settings under which operands cannot be rounded, or nobody reads what is set."""
    training = config.training
    if training.float8 == "none":
        if training.float8_weight_gradient != "high":
            yield (
                f"training.float8_weight_gradient = {training.float8_weight_gradient} has no "
                f"effect under {REMEDY}. Use high, or {WHERE}."
            )
        return
    if training.precision == "float64":
        yield (
            f"{WHERE} rounds to 8 bits what training.precision = float64 computes in 64. "
            f"Use precision bf16, or {REMEDY}."
        )
    if training.cuda_graph:
        yield (
            f"{WHERE} rounds each weight when it is used first, but training.cuda_graph = true "
            f"replays what it captured. Use cuda_graph = false, or {REMEDY}."
        )
    if training.overlap_update:
        yield (
            f"{WHERE} needs the largest weights of the whole update before the next forward pass, "
            "under which training.overlap_update = true lets it run. "
            f"Use overlap_update = false, or {REMEDY}."
        )
    tokens = training.micro_batch_size * config.model.seq_length
    tokens //= config.parallel.context_parallel_size
    if training.float8_weight_gradient == "float8" and tokens % MULTIPLE:
        yield (
            f"training.float8_weight_gradient = float8 sums over the {tokens} tokens of a "
            f"micro-batch on a rank, which are no multiple of {MULTIPLE}. "
            "Use high, or another micro_batch_size."
        )
