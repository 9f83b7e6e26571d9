"""What a rank holds, on paper: read off the model of each stage, built on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch

from megatron_completep.completep import table_of
from megatron_completep.config.schema import Config, ParallelConfig
from megatron_completep.model.gpt import GPT, ChunkRange
from megatron_completep.model.stages import split_stages
from megatron_completep.optim.layout import Layout, elements_of_bucket, entry_of, lay_out
from megatron_completep.optim.rules import RULES
from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.float8 import float8_settings
from megatron_completep.parallel.micro_batch import MicroBatchSizes
from megatron_completep.parallel.parameter import Spec, specs_of


def element_bytes(config: Config) -> int:
    """Bytes of an element of parameters and activations."""
    return {"float32": 4, "float64": 8}.get(config.training.precision, 2)


def wide_bytes(config: Config) -> int:
    """Bytes of an element of gradients, statistics and optimizer state."""
    return 8 if config.training.precision == "float64" else 4


def micro_batch_sizes(config: Config) -> MicroBatchSizes:
    """What modules are told when they are asked how many bytes they keep for backward."""
    model = config.model
    parallel = config.parallel
    whole_tokens = model.seq_length * config.training.micro_batch_size
    tokens = whole_tokens // parallel.context_parallel_size
    # Tensor ranks share the residual stream's tokens under sequence parallelism alone.
    sequence_parts = parallel.tensor_parallel_size if parallel.sequence_parallel else 1
    return MicroBatchSizes(
        tokens=tokens,
        local_tokens=tokens // sequence_parts,
        whole_tokens=whole_tokens,
        element_bytes=element_bytes(config),
        stream_bytes=4 if model.fp32_residual else element_bytes(config),
        wide_bytes=wide_bytes(config),
    )


def imagined_context(parallel: ParallelConfig) -> ParallelContext:
    """The first rank of a mesh of these sizes, without process groups: enough for a meta model."""
    return ParallelContext(
        device=torch.device("meta"),
        tensor=Axis("tensor", 0, parallel.tensor_parallel_size),
        pipeline=Axis("pipeline", 0, parallel.pipeline_parallel_size),
        context=Axis("context", 0, parallel.context_parallel_size),
        # As many as the experts need; no parameter of a model depends on the others.
        shard=Axis("shard", 0, parallel.expert_parallel_size),
        expert_size=parallel.expert_parallel_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_parallel_size > 1,
        heads_at_once=parallel.context_heads_at_once,
    )


def rank_stages(config: Config, pipeline_rank: int) -> list[ChunkRange]:
    """The stages of one pipeline rank, in forward order."""
    size = config.parallel.pipeline_parallel_size
    return split_stages(config.model, config.parallel)[pipeline_rank::size]


def stage_model(config: Config, stage: ChunkRange) -> GPT:
    """The model of one stage as the first tensor rank holds it, on the meta device."""
    context = imagined_context(config.parallel)
    recompute = config.training.recompute
    return GPT(config.model, table_of(config), context, stage, recompute=recompute)


def rank_models(config: Config, pipeline_rank: int) -> list[GPT]:
    """The models of one pipeline rank's stages, in forward order."""
    return [stage_model(config, stage) for stage in rank_stages(config, pipeline_rank)]


def backward_specs(models: Sequence[GPT]) -> dict[str, Spec]:
    """The parameters of one rank's models, in backward order, as the optimizer lays them out."""
    specs: dict[str, Spec] = {}
    # The optimizer's buckets fill from the first parameter whose gradient is complete.
    for model in reversed(models):
        specs |= reversed(specs_of(model).items())
    return specs


def rank_specs(config: Config, pipeline_rank: int) -> dict[str, Spec]:
    """The parameters of one pipeline rank, in backward order."""
    return backward_specs(rank_models(config, pipeline_rank))


def float8_weights(config: Config, specs: Mapping[str, Spec]) -> list[str]:
    """The names of the parameters that float8 products serve."""
    if config.training.float8 == "none":
        return []
    settings = float8_settings(config.training)
    return [name for name, s in specs.items() if settings.takes(s.role, s.local_shape)]


def float8_elements(config: Config, specs: Mapping[str, Spec]) -> int:
    """The elements of those parameters on a rank."""
    return sum(prod(specs[name].local_shape) for name in float8_weights(config, specs))


def shard_count(config: Config, gradient_size: int) -> int:
    """Ranks that share one copy of the optimizer state."""
    return config.parallel.optimizer_shard_size or gradient_size


def shards_of_axes(config: Config, gradient_size: int) -> dict[str, int]:
    """For each axis over which gradients are summed, the ranks that share one copy of the state."""
    shards = shard_count(config, gradient_size)
    parallel = config.parallel
    of_stage = shards * parallel.tensor_parallel_size
    return {"gradient": shards, "expert_data": of_stage // parallel.expert_parallel_size}


def shard_places(config: Config, shard_rank: int, tensor_rank: int) -> dict[str, int]:
    """For each of these axes, which shard a rank holds."""
    parallel = config.parallel
    of_stage = shard_rank * parallel.tensor_parallel_size + tensor_rank
    return {"gradient": shard_rank, "expert_data": of_stage // parallel.expert_parallel_size}


def rank_layout(config: Config, specs: dict[str, Spec], gradient_size: int) -> Layout:
    """The optimizer's layout of one pipeline rank's parameters (`rank_specs`)."""
    kind_of = RULES[table_of(config).rule].kind_of
    entries = [entry_of(name, spec, kind_of(spec)) for name, spec in specs.items()]
    elements = elements_of_bucket(config.parallel.bucket_megabytes, gradient_size)
    return lay_out(entries, shards_of_axes(config, gradient_size), elements)


def state_elements(config: Config, layout: Layout) -> int:
    """Numbers that a rank keeps in its shard: the masters and the rule's states."""
    rule = RULES[table_of(config).rule]
    total = 0
    for bucket in layout.buckets:
        states = 1 + len(rule.states_of_kind(bucket.kind))
        total += bucket.size // bucket.shards * states
    return total


def stored_elements(config: Config) -> int:
    """Numbers that a checkpoint holds: the masters and the rule's states of all parameters."""
    rule = RULES[table_of(config).rule]
    total = 0
    for stage in split_stages(config.model, config.parallel):
        # Of a tied parameter on two stages one is a copy, which no checkpoint holds.
        for name, spec in specs_of(stage_model(config, stage)).items():
            if not spec.is_copy(name):
                total += spec.size * len(rule.stored_states(spec) or rule.all_powers())
    return total
