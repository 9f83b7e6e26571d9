"""What a rank holds, on paper: its stages, their parameters and the optimizer's layout, read off a model on the meta device."""

from __future__ import annotations

import torch

from megatron_completep.completep import table_of
from megatron_completep.config.schema import Config, ParallelConfig
from megatron_completep.model.gpt import GPT, Stage
from megatron_completep.model.stages import split_stages
from megatron_completep.optim.layout import Layout, entry_of, lay_out
from megatron_completep.optim.rules import RULES
from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.parameter import Spec, specs_of


def element_bytes(config: Config) -> int:
    """Of parameters and activations."""
    return {"float32": 4, "float64": 8}.get(config.training.precision, 2)


def wide_bytes(config: Config) -> int:
    """Of gradients, statistics and optimizer state."""
    return 8 if config.training.precision == "float64" else 4


def imagined_context(parallel: ParallelConfig) -> ParallelContext:
    """The first rank of a mesh of these sizes, with nobody to communicate with: enough to build a model on paper."""
    return ParallelContext(
        device=torch.device("meta"),
        tensor=Axis("tensor", 0, parallel.tensor_parallel_size),
        pipeline=Axis("pipeline", 0, parallel.pipeline_parallel_size),
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_parallel_size > 1,
    )


def stage_specs(config: Config, stage: Stage) -> dict[str, Spec]:
    """The parameters of a stage as its first tensor rank holds them, in forward order."""
    context = imagined_context(config.parallel)
    return specs_of(GPT(config.model, table_of(config), context, stage))


def rank_stages(config: Config, pipeline_rank: int) -> list[Stage]:
    """Stages of one pipeline rank."""
    size = config.parallel.pipeline_parallel_size
    return split_stages(config.model, config.parallel)[pipeline_rank::size]


def rank_specs(config: Config, pipeline_rank: int) -> dict[str, Spec]:
    """The parameters of one pipeline rank, in the backward order in which the optimizer lays them out."""
    specs: dict[str, Spec] = {}
    for stage in reversed(rank_stages(config, pipeline_rank)):
        specs |= reversed(stage_specs(config, stage).items())
    return specs


def shard_count(config: Config, data_size: int) -> int:
    """Data ranks that share one copy of the optimizer state."""
    return config.parallel.optimizer_shard_size or data_size


def rank_layout(config: Config, specs: dict[str, Spec], data_size: int) -> Layout:
    """The optimizer's layout of one pipeline rank's parameters (`rank_specs`)."""
    entries = [entry_of(name, spec) for name, spec in specs.items()]
    bucket_elements = int(config.parallel.bucket_megabytes * 2**20 / 4)
    return lay_out(entries, {"gradient": shard_count(config, data_size)}, bucket_elements)


def state_count(config: Config) -> int:
    """How many numbers the optimizer keeps of every element: the master and the update rule's states."""
    return len(RULES[table_of(config).rule].all_powers())


def stored_elements(config: Config) -> int:
    """Elements of all logical parameters: what a checkpoint holds of each state."""
    total = 0
    for stage in split_stages(config.model, config.parallel):
        specs = stage_specs(config, stage)
        total += sum(spec.size for name, spec in specs.items() if not spec.is_copy(name))
    return total
