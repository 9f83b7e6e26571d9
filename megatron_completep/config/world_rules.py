"""The rules between a configuration and the number of processes, which is known only at launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_completep.config import derived
from megatron_completep.config.graph_rules import graph_world_problems
from megatron_completep.config.moe_rules import expert_world_problems
from megatron_completep.config.remedies import (
    VALUES,
    Choice,
    Problem,
    all_divisors,
    closest,
    multiples,
)
from megatron_completep.config.schema import Config


def world_problems(config: Config, world_size: int) -> Iterator[Problem]:
    """What does not fit the number of processes of the whole run."""
    parallel = config.parallel
    model_ranks = derived.model_parallel_size(parallel)
    # Without whole replicas there is no data-parallel size, which the other rules are about.
    if world_size % model_ranks:
        products = closest(all_divisors(world_size), model_ranks)
        yield (
            f"{derived.model_parallel_sizes(parallel)} "
            f"does not divide the world size {world_size}. Start a multiple of {model_ranks} "
            f"processes, or use sizes whose product is {products}."
        )
        return

    replicas = derived.data_parallel_size(config, world_size)
    shard_size = parallel.optimizer_shard_size
    sharing = derived.gradient_parallel_size(config, world_size)
    if shard_size is not None and sharing % shard_size:
        name = f"the data-parallel size {replicas} (world size {world_size} / {model_ranks})"
        if sharing != replicas:
            name = f"data x context ranks = {replicas} x {sharing // replicas} = {sharing}"
        yield Choice(
            f"parallel.optimizer_shard_size = {shard_size} does not divide {name}. "
            f"Use {VALUES}, or null.",
            "parallel.optimizer_shard_size",
            all_divisors(sharing),
            near=shard_size,
        )
    yield from expert_world_problems(config, world_size)
    yield from _batch_problems(config, replicas)
    yield from graph_world_problems(config, world_size)
    largest_rank = max(config.profiling.ranks)
    if largest_rank >= world_size and config.profiling.first_step is not None:
        yield (
            f"profiling.ranks names rank {largest_rank}, "
            f"but the ranks go from 0 to {world_size - 1}. Leave it out."
        )


def _batch_problems(config: Config, replicas: int) -> Iterator[Problem]:
    """What keeps batches from being dealt out evenly to the replicas and their micro-batches."""
    micro = config.training.micro_batch_size
    together = micro * replicas  # samples of one micro-batch on every replica
    uneven = False
    for path, samples in _batches(config):
        if samples % together:
            uneven = True
            yield Choice(
                f"{path} = {samples} is not a multiple of micro_batch_size x data-parallel size = "
                f"{micro} x {replicas} = {together}. Use {VALUES}, or another micro_batch_size.",
                path,
                multiples(together, samples),
                near=samples,
                around=True,
            )
    # The number of micro-batches is whole only in an even batch.
    if not uneven:
        for samples in derived.batch_sizes(config.training):
            yield from _micro_batch_problems(config, samples, together)


def _batches(config: Config) -> Iterator[tuple[str, int]]:
    """(setting, samples) of what must be dealt out evenly to micro-batches and data ranks."""
    yield "training.global_batch_size", config.training.global_batch_size
    if ramp := config.training.batch_ramp:
        yield "training.batch_ramp.start", ramp.start
        yield "training.batch_ramp.increment", ramp.increment


def _micro_batch_problems(config: Config, samples: int, together: int) -> Iterator[Problem]:
    """What the pipeline schedules demand of the number of micro-batches.

    The demands are those of torch.distributed.pipelining. samples: of one of the run's batches.
    together: of one micro-batch on every replica.
    """
    parallel = config.parallel
    ranks = parallel.pipeline_parallel_size
    if ranks == 1:
        return

    # A batch of the ramp is mended at its beginning, the final one at its own size.
    final_samples = config.training.global_batch_size
    name = "training.global_batch_size"
    path = name
    candidates: Sequence[int] = multiples(together, samples)
    if samples != final_samples:
        name = "training.batch_ramp: the batch size"
        path = "training.batch_ramp.start"
        candidates = range(together, final_samples, together)

    count = samples // together
    where = f"{name} = {samples} makes {count} micro-batches"
    if parallel.schedule == "1f1b" and count < ranks:
        smaller = " a smaller micro_batch_size," if config.training.micro_batch_size > 1 else ""
        yield Choice(
            f"{where}, fewer than parallel.pipeline_parallel_size = {ranks}, which the schedule "
            f"1f1b needs. Use {path} = {VALUES},{smaller} or the schedule gpipe.",
            path,
            [candidate for candidate in candidates if candidate >= ranks * together],
            near=samples,
        )
    # These schedules take micro-batches in rounds of one a stage, and all rounds must be equal.
    rounds = max(1, count // ranks)
    if parallel.schedule in ("interleaved_1f1b", "zero_bubble") and count % rounds:
        yield Choice(
            f"{where}, which parallel.schedule = {parallel.schedule} cannot deal out in {rounds} "
            f"equal rounds over {ranks} stages. Use {VALUES}.",
            path,
            [candidate for candidate in candidates if candidate % (ranks * together) == 0],
            near=samples,
            around=True,
        )
