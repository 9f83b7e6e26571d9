"""With what `parallel.sharding = gradients` does not go (optim/gradient_buckets.py)."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_completep.config.remedies import Problem
from megatron_completep.config.schema import Config

WHERE = "parallel.sharding = gradients"
REMEDY = "parallel.sharding = optimizer"


def sharding_problems(config: Config) -> Iterator[Problem]:
    """Settings under which gradients cannot be reduced in every micro-batch, or are not shared."""
    parallel = config.parallel
    if parallel.sharding != "gradients":
        return
    stages = parallel.pipeline_parallel_size
    if stages > 1:
        yield (
            f"{WHERE} reduces and frees gradients between two micro-batches, but a pipeline "
            f"(parallel.pipeline_parallel_size = {stages}) has several under way. Use {REMEDY}, "
            "or parallel.pipeline_parallel_size = 1 with more tensor ranks or recomputation."
        )
    if parallel.optimizer_shard_size == 1:
        yield (
            f"{WHERE} divides gradients over the ranks that share the optimizer, but "
            f"parallel.optimizer_shard_size = 1. Use {REMEDY}, or leave the size null."
        )
    if config.training.cuda_graph:
        yield (
            f"training.cuda_graph = true replays gradients in fixed memory, but {WHERE} frees "
            f"them. Use {REMEDY}, or training.cuda_graph = false."
        )
